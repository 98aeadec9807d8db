"""Weights that have seen CT: Astra's ResNet-152, frozen, behind the paper's attention.

`--config=configs/ct.py:/data/covidx-ct` computes the features of every slice of that raw COVIDx-CT directory once, and
trains the attention modules and the classifier on them. It needs the extra `ct` (docs/ct_weights.md). Without a
directory the run uses generated phantoms at demo scale.
"""

from ml_collections import ConfigDict

from covidjax.configs import att2


def get_config(raw_dir: str = '') -> ConfigDict:
    """Returns the values for real slices with a raw directory, demo values without."""
    config = att2.get_config(raw_dir).unlock()  # the fields are explained there
    config.name = 'ct'
    config.data.image_size = 224

    model = config.model
    model.stage_sizes = (3, 8, 36, 3)
    model.width = 64
    model.block = 'bottleneck'
    model.stem = 'imagenet'
    model.tail_blocks = 1  # not used by additive compatibility
    model.pretrained = 'astra'
    model.frozen = True
    model.dropout = 0.3

    train = config.train
    train.batch_size = 32
    train.steps_per_epoch = 0  # one pass over the training slices
    train.num_epochs = 15
    train.patience = 15
    train.learning_rate = 1e-3
    train.schedule = 'cosine'
    train.warmup_steps = 30
    train.weight_decay = 0.05
    train.augment = 'none'  # features are computed once
    train.label_smoothing = 0.1

    if not raw_dir:
        config.data.image_size = 64
        train.steps_per_epoch = 60
        train.num_epochs = 5
        train.patience = 5
    return config.lock()
