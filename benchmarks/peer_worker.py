"""The worker of the inference engines: ONNX Runtime, OpenVINO and torch.compile on the models of `torch_worker`.

Needs `requirements-torch.txt`. Each engine gets the model as PyTorch exports it, and a batch float32 in memory.
"""

import io

import numpy as np
import torch

from benchmarks import workers
from benchmarks.torch_worker import create_model, draw_images, to_input


class ReducedAttention(torch.nn.Module):
    """Equation 11 without what its softmax removes: the scores are <v, x_i>, v = W_p^T u."""

    def __init__(self, attention):
        super().__init__()
        u = attention.u.weight
        self.v = torch.nn.Parameter(u @ attention.W_p.weight if hasattr(attention, 'W_p') else u)

    def forward(self, x, g):
        flat = x.flatten(2).transpose(1, 2)
        attention = (flat @ self.v.T)[..., 0].softmax(-1)
        return (attention[..., None] * flat).sum(1), attention.unflatten(1, x.shape[2:])


def leave_out_dead_work(model):
    """Removes the tail and the projection, which cannot change the output (see `dead_tail.py`)."""
    if hasattr(model, 'tail'):
        model.tail = torch.nn.Identity()
    model.attention1, model.attention2 = ReducedAttention(model.attention1), ReducedAttention(model.attention2)
    return model


class Logits(torch.nn.Module):
    """Returns the logits only, as our side does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(images)[0]


def export_onnx(model, images):
    file = io.BytesIO()
    torch.onnx.export(model, (images,), file, dynamo=False, opset_version=17, input_names=['images'])
    return file.getvalue()


def start_onnxruntime(model, images, options):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(export_onnx(model, images), settings, providers=['CPUExecutionProvider'])
    feed = {'images': images.numpy()}
    return lambda: session.run(None, feed)[0], {'onnxruntime': onnxruntime.__version__}


def start_openvino(model, images, options):
    import openvino

    found = openvino.convert_model(model, example_input=images, input=list(images.shape))
    precision = {'float32': 'f32', 'bfloat16': 'bf16'}[options.dtype]
    compiled = openvino.compile_model(
        found, 'CPU', {'INFERENCE_PRECISION_HINT': precision, 'PERFORMANCE_HINT': 'LATENCY'}
    )
    request, batch = compiled.create_infer_request(), images.numpy()
    return lambda: next(iter(request.infer([batch], share_inputs=True).values())), {'openvino': openvino.__version__}


def start_compiled(model, images, options):
    import torch._inductor.config

    torch._inductor.config.freezing = True  # folds batch normalisation into the weights
    dtype = getattr(torch, options.dtype)
    model = model.to(dtype).to(memory_format=torch.channels_last)
    images = images.to(dtype).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model)

    def run():
        with torch.inference_mode():
            return compiled(images).float().numpy()

    return run, {'torch': torch.__version__}


ENGINES = {'onnxruntime': start_onnxruntime, 'openvino': start_openvino, 'torch.compile': start_compiled}


def start_inference(options):
    model = create_model(options).eval()
    images = to_input(draw_images(options), options)
    with torch.no_grad():
        expected = model(images)[0].numpy()
        if options.no_dead_work:
            model = leave_out_dead_work(model)
        call, facts = ENGINES[options.engine](Logits(model).eval(), images, options)
    error = float(np.abs(call() - expected).max() / np.abs(expected).max())
    if error > {'float32': 1e-3, 'bfloat16': 0.1}[options.dtype]:
        raise ValueError(f'{options.engine} differs from PyTorch by {error:.2g} of the largest logit')

    def infer():
        for _ in range(options.steps):
            call()
        return options.batch_size * options.steps

    return infer, {'torch': torch.__version__, **facts, 'error': error}


if __name__ == '__main__':
    workers.serve({'inference': start_inference})
