"""The paper's two models, the light one and that of lesions in PyTorch, with the parameter names of `covidjax export`.

Needs only torch, torchvision and efficientnet_lite_pytorch.

Shapes: B batch, T slices, E embedding, H hidden units of both directions, K classes.
"""

import torch
from efficientnet_lite_pytorch import EfficientNet, get_model_params
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet


class ImageAttention(nn.Module):
    """The paper's equations (7) to (12) as printed; 'tanh' is the alignment model of Bahdanau et al."""

    def __init__(self, compatibility, local_features, global_features):
        super().__init__()
        self.compatibility = compatibility
        if compatibility != 'uniform' and local_features != global_features:
            self.W_p = nn.Linear(local_features, global_features, bias=False)
        if compatibility in ('additive', 'tanh'):
            self.u = nn.Linear(global_features, 1, bias=False)

    def forward(self, x, g):
        """Maps local features [B, C, h, w] and the global one [B, D] to a context vector [B, C] and a map [B, h, w]."""
        flat = x.flatten(2).transpose(1, 2)
        if self.compatibility == 'uniform':
            scores = torch.zeros_like(flat[..., 0])
        else:
            projected = self.W_p(flat) if hasattr(self, 'W_p') else flat
            g = g[:, None]
            scores = {
                'additive': lambda: self.u(projected + g)[..., 0],
                'dot': lambda: (projected * g).sum(-1),
                'tanh': lambda: self.u(torch.tanh(projected + g))[..., 0],
            }[self.compatibility]()
        attention = scores.softmax(-1)
        return (attention[..., None] * flat).sum(1), attention.unflatten(1, x.shape[2:])


class ResNet50Att2(ResNet):
    """torchvision's ResNet-50 with three more bottlenecks and two attention modules (section IV-A)."""

    def __init__(self, num_classes=3, compatibility='additive', combination='concat'):
        super().__init__(Bottleneck, [3, 4, 6, 3])
        del self.avgpool, self.fc
        self.tail = nn.Sequential(*(Bottleneck(2048, 512) for _ in range(3)))
        self.attention1 = ImageAttention(compatibility, 1024, 2048)
        self.attention2 = ImageAttention(compatibility, 2048, 2048)
        self.combination = combination
        if combination == 'concat':
            self.classifier = nn.Linear(3072, num_classes)
        else:
            self.classifier1, self.classifier2 = nn.Linear(1024, num_classes), nn.Linear(2048, num_classes)

    def extract(self, images):
        """Returns the outputs of all stages and of the tail."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4, self.tail):
            x = layer(x)
            stages.append(x)
        return stages

    def forward(self, images):
        """Maps images [B, 3, H, W] in [-1, 1] to logits [B, K], embedding [B, 3072] and the two attention maps."""
        *_, x1, x2, tail = self.extract(images)
        g = tail.mean((2, 3))
        context1, map1 = self.attention1(x1, g)
        context2, map2 = self.attention2(x2, g)
        embedding = torch.cat([context1, context2], 1)
        if self.combination == 'concat':
            logits = self.classifier(embedding)
        else:
            logits = (self.classifier1(context1).softmax(1) + self.classifier2(context2).softmax(1)).div(2).log()
        return logits, embedding, (map1, map2)


def run_blocks(module, images):
    """Returns the features of an EfficientNet-Lite0 at strides 4, 8 and 16, and those of its last block."""
    x = module._swish(module._bn0(module._conv_stem(images)))
    features = []
    for i, block in enumerate(module._blocks):
        x = block(x)
        if i in (2, 4, 10):
            features.append(x)
    return features, x


class Lite0Att2(EfficientNet):
    """EfficientNet-Lite0 with two attention modules; the global feature is the average of the last features."""

    def __init__(self, num_classes=3, compatibility='additive', image_size=224):
        super().__init__(*get_model_params('efficientnet-lite0', {'image_size': image_size, 'drop_connect_rate': 0.0}))
        del self._fc
        self.attention1 = ImageAttention(compatibility, 112, 1280)
        self.attention2 = ImageAttention(compatibility, 1280, 1280)
        self.classifier = nn.Linear(112 + 1280, num_classes)

    def extract(self, images):
        """Returns the features at strides 4, 8, 16 and 32."""
        features, x = run_blocks(self, images)
        return [*features, self._swish(self._bn1(self._conv_head(x)))]

    def forward(self, images):
        """Maps images [B, 3, H, W], (grey value - 127) / 128, to logits, embedding and the two attention maps."""
        *_, x1, x2 = self.extract(images)
        g = x2.mean((2, 3))
        context1, map1 = self.attention1(x1, g)
        context2, map2 = self.attention2(x2, g)
        embedding = torch.cat([context1, context2], 1)
        return self.classifier(embedding), embedding, (map1, map2)


class Lite0Lesions(EfficientNet):
    """Outlines lungs, lesions and consolidation: EfficientNet-Lite0 without its last convolution, and a decoder."""

    def __init__(self, image_size=224):
        super().__init__(*get_model_params('efficientnet-lite0', {'image_size': image_size, 'drop_connect_rate': 0.0}))
        del self._fc, self._conv_head, self._bn1
        inputs = 320
        for i, (skip, outputs) in enumerate(((112, 64), (40, 48), (24, 32))):
            setattr(self, f'decoder_{i}', nn.Conv2d(inputs + skip, outputs, 3, padding=1, bias=False))
            setattr(self, f'decoder_bn_{i}', nn.BatchNorm2d(outputs))
            inputs = outputs
        self.classifier = nn.Linear(inputs, 3)

    def forward(self, images):
        """Maps images [B, 3, S, S], (grey value - 127) / 128, to logits [B, S / 4, S / 4, 3]."""
        skips, x = run_blocks(self, images)
        for i, skip in enumerate(reversed(skips)):
            x = nn.functional.interpolate(x, scale_factor=2, mode='nearest')
            x = getattr(self, f'decoder_{i}')(torch.cat([x, skip], 1))
            x = torch.relu(getattr(self, f'decoder_bn_{i}')(x))
        return self.classifier(x.permute(0, 2, 3, 1))


class GlobalAttention(nn.Module):
    """The paper's equations (1) to (4)."""

    def __init__(self, features):
        super().__init__()
        self.W_g = nn.Linear(features, features)
        self.W_s = nn.Linear(features, features, bias=False)

    def forward(self, h, lengths):
        """Maps hidden states [B, T, H] to a context vector [B, H] and attentions [B, T], 0 in the padding."""
        last = h[torch.arange(len(h)), lengths - 1]
        g = torch.tanh(self.W_g(last))
        scores = (g[:, None] * self.W_s(h)).sum(-1)
        padding = torch.arange(h.shape[1])[None] >= lengths[:, None]
        attention = scores.masked_fill(padding, -torch.inf).softmax(-1)
        return (attention[..., None] * h).sum(1), attention


class SequenceClassifier(nn.Module):
    """Bidirectional LSTM, attention and linear classifier (section V-A)."""

    def __init__(self, embedding=3072, hidden=128, num_classes=3):
        super().__init__()
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True, bidirectional=True)
        self.attention = GlobalAttention(2 * hidden)
        self.classifier = nn.Linear(2 * hidden, num_classes)

    def forward(self, x, lengths):
        """Maps embeddings [B, T, E] and lengths [B] to logits [B, K] and attentions [B, T]."""
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        context, attention = self.attention(h, lengths)
        return self.classifier(context), attention


class ResNet50LstmAtt2(nn.Module):
    """The slice model, frozen, and the sequence classifier on its embeddings (section V)."""

    def __init__(self, num_classes=3, **options):
        super().__init__()
        self.extractor = ResNet50Att2(num_classes, **options)
        self.sequence = SequenceClassifier(num_classes=num_classes)

    def forward(self, images, lengths):
        """Maps scans [B, T, 3, H, W] in [-1, 1] and their lengths [B] to logits [B, K] and attentions [B, T]."""
        with torch.no_grad():
            embeddings = self.extractor(images.flatten(0, 1))[1].unflatten(0, images.shape[:2])
        return self.sequence(embeddings, lengths)
