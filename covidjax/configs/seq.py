"""The paper's second experiment: ResNet50-LSTM-ATT2 classifies whole scans (section V).

`--config=configs/seq.py:/data/covidx-ct` has the paper's values, for that raw COVIDx-CT directory. Without a directory
the run uses generated phantoms at demo scale. Without `--config.extractor` the run first trains the slice model on the
same data in <workdir>/extractor, with the settings of `config.att2`.
"""

from ml_collections import ConfigDict

from covidjax.configs import att2


def get_config(raw_dir: str = '') -> ConfigDict:
    """Returns the paper's values for a raw directory, or demo values without one."""
    slices = att2.get_config(raw_dir).unlock()

    config = ConfigDict()
    config.name = 'seq'
    config.seed = 0  # for initial weights, data order and augmentation
    config.extractor = ''  # workdir of a finished att2 run; empty: train one in <workdir>/extractor
    config.lesions = ''  # as in att2.py, for scans

    config.data = data = slices.data  # as in att2.py, for both models; `balance` is for the slice model
    # 16: takes 16 slices from each scan that has them. Less: takes each scan with at least so many slices, whole.
    data.min_slices = 16
    # Number of augmentations drawn once for each training scan. Their embeddings stay in memory; the epochs use them in
    # turn. 0: a new draw in every epoch, as in the paper. Exact if train.augment is 'none'. On CT-2A (2,390 scans of 16
    # slices, 3072 float32 each) a draw takes 470 MB of memory in every process.
    data.cached_draws = 0

    config.att2 = ConfigDict()  # the slice model; a given extractor has its own `model`
    config.att2.seed = 0
    config.att2.model = slices.model
    config.att2.train = slices.train

    config.model = model = ConfigDict()
    model.head = 'lstm'  # on top of the slice model: 'lstm' (the paper) or 'gated' (attention without recurrence)
    model.hidden = 128  # LSTM units per direction

    config.train = train = ConfigDict()
    train.batch_size = 16  # scans per step, over all devices; an epoch is one pass over the scans
    train.num_epochs = 50  # maximum
    train.patience = 10  # epochs without a better validation loss before stopping
    train.min_delta = 1e-4  # smallest decrease that counts as better
    train.learning_rate = 1e-4  # for Adam
    train.schedule = 'constant'  # 'constant' or 'cosine' (to 0 at the last step)
    train.warmup_steps = 0  # steps of linear warm-up from 0
    train.weight_decay = 5e-3
    train.decay = 'decoupled'  # 'decoupled' (AdamW) or 'l2' (in the gradient)
    train.augment = 'paper'  # as in att2.py, one draw for all slices of a scan
    train.scale = (0.9, 1.1)  # zoom; with the next two, of 'paper'
    train.brightness = 0.0  # half-width of the range of a factor about 1
    train.contrast = 0.0  # likewise, of the distance from the mean grey
    train.label_smoothing = 0.0
    train.ema_decay = 0.0  # of a moving average of the weights, which is validated and tested; 0: none
    train.dtype = 'float32'  # activations: 'float32' or 'bfloat16'; parameters and sums stay float32
    train.accumulation_steps = 1  # split a batch into this many parts, computed one after the other to save memory
    train.parallelism = 'jit'  # over devices: 'jit' (the compiler shards the batch) or 'pmap'
    train.checkpoint_steps = 0  # steps between checkpoints within an epoch; 0: only at the end of each epoch

    if not raw_dir:
        train.num_epochs = 12
        train.learning_rate = 1e-3
        train.schedule = 'cosine'
    return config.lock()
