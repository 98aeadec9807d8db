"""The paper's first experiment: ResNet50-ATT2 classifies single slices (section IV).

`--config=configs/att2.py:/data/covidx-ct` has the paper's values, for that raw COVIDx-CT directory. Without a directory
the run uses generated phantoms at demo scale: a smaller network, smaller slices and fewer steps.
"""

from ml_collections import ConfigDict


def get_config(raw_dir: str = '') -> ConfigDict:
    """Returns the paper's values for a raw directory, or demo values without one."""
    config = ConfigDict()
    config.name = 'att2'
    config.seed = 0  # for initial weights, data order and augmentation
    # lesion model that decides on sick or not: workdir of a run of lesions.py, 'box' (of this package) or empty: none
    config.lesions = ''

    config.data = data = ConfigDict()
    data.raw_dir = raw_dir  # raw COVIDx-CT directory; empty: phantoms
    data.sources = ''  # the sources of metadata.csv to use, separated by commas; empty: all
    # draws of training slices: 'none' (as they are), 'class' (classes equally often, and of one weight in the loss)
    # or 'class_and_source' (moreover, the sources of a class equally often)
    data.balance = 'none'
    data.prepared_dir = ''  # prepared slices, shared by runs; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets
    data.image_size = 224  # side of a slice, pixels
    data.region = 'body'  # what is left of a slice: 'body' (its box) or 'lungs' (on black)
    data.outlines = ''  # folders with slices.csv, for train.attention_loss, with commas between; phantoms need none
    data.skip_bad = False  # skip (and record) missing and unreadable images instead of stopping
    data.phantom_seed = 0  # seed of the phantoms; unused with a raw directory

    config.model = model = ConfigDict()
    model.backbone = 'resnet'  # 'resnet' or 'efficientnet_lite0' (see lite.py)
    model.stage_sizes = (3, 4, 6, 3)  # residual blocks per stage
    model.width = 64  # channels of the first stage
    model.block = 'bottleneck'  # 'bottleneck' or 'basic'
    model.stem = 'imagenet'  # 'imagenet' (7x7 and max-pool, stride 4) or 'small' (3x3, stride 2)
    model.tail_blocks = 3  # blocks after the last stage, which compute the global feature
    model.compatibility = 'additive'  # (eq. 11), 'dot' (eq. 12), 'tanh' (Bahdanau) or 'uniform' (average pooling)
    model.combination = 'concat'  # how the two attention modules combine: 'concat' or 'average'
    model.dropout = 0.0  # of the embedding
    model.mirror = False  # evaluation averages over a slice and its mirror image
    # Hugging Face name, .safetensors file, 'astra' (weights that have seen CT, docs/ct_weights.md); for
    # efficientnet_lite0 also 'efficientnet-lite0' (ImageNet) or 'box' (the lesion model of this package); empty: from
    # scratch
    model.pretrained = 'timm/resnet50.tv_in1k'
    model.frozen = False  # keep the backbone as it is; its features are computed once (needs train.augment='none')
    model.pooled = False  # attend to mean and maximum of a map instead of its positions

    config.train = train = ConfigDict()
    train.batch_size = 64  # slices per step, over all devices
    train.steps_per_epoch = 1000  # drawn from an endless shuffled stream
    train.num_epochs = 25  # maximum
    train.patience = 5  # epochs without a better validation loss before stopping
    train.min_delta = 1e-4  # smallest decrease that counts as better
    train.learning_rate = 5e-4  # for Adam
    train.schedule = 'constant'  # 'constant' or 'cosine' (to 0 at the last step)
    train.warmup_steps = 0  # steps of linear warm-up from 0
    train.weight_decay = 0.0
    train.decay = 'decoupled'  # 'decoupled' (AdamW) or 'l2' (in the gradient)
    # 'paper' (flips, blur and affine of section IV-B), 'scanner' (window, sharpness, noise, zoom ...) or 'none'
    train.augment = 'paper'
    train.scale = (0.9, 1.1)  # zoom; with the next two, of 'paper'
    train.brightness = 0.0  # half-width of the range of a factor about 1
    train.contrast = 0.0  # likewise, of the distance from the mean grey
    train.label_smoothing = 0.0
    train.attention_loss = 0.0  # factor of a loss that pulls attention toward lesions, where a slice has outlines
    train.ema_decay = 0.0  # of a moving average of the weights, which is validated and tested; 0: none
    train.dtype = 'float32'  # activations: 'float32' or 'bfloat16'; parameters and sums stay float32
    train.accumulation_steps = 1  # split a batch into this many parts, computed one after the other to save memory
    train.parallelism = 'jit'  # over devices: 'jit' (the compiler shards the batch) or 'pmap'
    train.checkpoint_steps = 0  # steps between checkpoints within an epoch; 0: only at the end of each epoch

    if not raw_dir:
        data.image_size = 64
        model.stage_sizes = (1, 1, 1, 1)
        model.width = 8
        model.block = 'basic'
        model.stem = 'small'
        model.tail_blocks = 1
        model.pretrained = ''
        train.batch_size = 32
        train.steps_per_epoch = 100
        train.num_epochs = 18
        train.learning_rate = 3e-3
        train.schedule = 'cosine'
        train.warmup_steps = 50
    return config.lock()
