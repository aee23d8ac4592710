"""ResNet of Bottlenecks in plain JAX, NHWC, timed. ``python jax_resnet.py DATA.npz {train,infer} {bf16,fp16,fp32}``.

DATA has torchvision's state_dict and ``images`` (N, H, W, 3). Training: parameters fp32, convolutions in the dtype,
batch norm's arithmetic fp32, cross-entropy, SGD with momentum and weight decay, buffers donated. Inference: everything
in the dtype, batch norm folded by XLA as it can. The last line of stdout is one JSON document: ``samples_s`` (seconds a
step, each the mean of several queued ones, so that the host's time is hidden), ``result`` (logits of the first images,
or the loss of the first step) and ``config``.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

_DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16, "fp32": jnp.float32}
_EPS = 1e-5
_FEW = 8
_QUEUED = 5
_ROUNDS = 10
_RATE, _MOMENTUM, _DECAY = 1e-9, 0.9, 1e-4
_AXES = ("NHWC", "HWIO", "NHWC")


def conv(x, weight, stride, dtype):
    """Without bias, padding (R - 1) // 2; ``weight`` HWIO."""
    pad = (weight.shape[0] - 1) // 2
    return jax.lax.conv_general_dilated(
        x.astype(dtype), weight.astype(dtype), (stride, stride), [(pad, pad)] * 2, dimension_numbers=_AXES
    )


def norm(x, p, name, train):
    """Batch norm in fp32, back to the dtype of ``x``."""
    wide = x.astype(jnp.float32)
    if train:
        mean = wide.mean((0, 1, 2))
        var = jnp.square(wide - mean).mean((0, 1, 2))
    else:
        mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    scale = p[f"{name}.weight"].astype(jnp.float32) * jax.lax.rsqrt(var.astype(jnp.float32) + _EPS)
    return (wide * scale + (p[f"{name}.bias"] - mean * scale)).astype(x.dtype)


def bottleneck(x, p, name, stride, dtype, train):
    """The block of arXiv 1512.03385, stride in the 3x3."""
    out = jax.nn.relu(norm(conv(x, p[f"{name}.conv1.weight"], 1, dtype), p, f"{name}.bn1", train))
    out = jax.nn.relu(norm(conv(out, p[f"{name}.conv2.weight"], stride, dtype), p, f"{name}.bn2", train))
    out = norm(conv(out, p[f"{name}.conv3.weight"], 1, dtype), p, f"{name}.bn3", train)
    if f"{name}.downsample.0.weight" in p:
        x = conv(x, p[f"{name}.downsample.0.weight"], stride, dtype)
        x = norm(x, p, f"{name}.downsample.1", train)
    return jax.nn.relu(out + x)


def forward(p, images, dtype, train):
    """Logits in fp32."""
    x = jax.nn.relu(norm(conv(images, p["conv1.weight"], 2, dtype), p, "bn1", train))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)])
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in p:
            stride = 2 if stage > 1 and block == 0 else 1
            x = bottleneck(x, p, f"layer{stage}.{block}", stride, dtype, train)
            block += 1
    x = x.astype(jnp.float32).mean((1, 2)).astype(dtype)
    logits = x @ p["fc.weight"].astype(dtype).T + p["fc.bias"].astype(dtype)
    return logits.astype(jnp.float32)


def loss_of(p, images, labels, dtype):
    """Cross-entropy."""
    logp = jax.nn.log_softmax(forward(p, images, dtype, True))
    return -jnp.take_along_axis(logp, labels[:, None], axis=1).mean()


@partial(jax.jit, static_argnames="dtype", donate_argnums=(0, 1))
def train_step(p, momentum, images, labels, dtype):
    """One step of SGD: (parameters, momentum, loss)."""
    loss, gradients = jax.value_and_grad(loss_of)(p, images, labels, dtype)
    momentum = jax.tree.map(lambda m, g, w: _MOMENTUM * m + g + _DECAY * w, momentum, gradients, p)
    return jax.tree.map(lambda w, m: w - _RATE * m, p, momentum), momentum, loss


@partial(jax.jit, static_argnames="dtype")
def infer(p, images, dtype):
    """Logits."""
    return forward(p, images, dtype, False)


def samples(step):
    """Seconds a step: each the mean of several that were queued."""
    for _ in range(2):
        jax.block_until_ready(step())
    found = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for _ in range(_QUEUED):
            out = step()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - begin) / _QUEUED)
    return found


def main(path, mode, name):
    """Load, run, print."""
    dtype = _DTYPES[name]
    with np.load(path) as data:
        images = jnp.asarray(data["images"])
        p = {key: jnp.asarray(data[key]) for key in data.files if key not in ("images",) and "num_batches" not in key}
    p = {key: w.transpose(2, 3, 1, 0) if w.ndim == 4 else w for key, w in p.items()}
    if mode == "infer":
        p = {key: w.astype(dtype) for key, w in p.items()}
        images = images.astype(dtype)
        result = infer(p, images, dtype)[:_FEW].tolist()
        times = samples(lambda: infer(p, images, dtype))
    else:
        p = {key: w for key, w in p.items() if "running" not in key}
        labels = jnp.arange(len(images)) % 1000
        state = [p, jax.tree.map(jnp.zeros_like, p)]

        def step():
            state[0], state[1], loss = train_step(*state, images, labels, dtype)
            return loss

        result = float(step())
        times = samples(step)
    device = jax.devices()[0]
    config = f"jax {jax.__version__}, {device.platform}, own process"
    print(json.dumps({"samples_s": times, "result": result, "config": config}))


if __name__ == "__main__":
    main(*sys.argv[1:])
