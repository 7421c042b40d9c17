"""Machines and links: what their makers say, and which share of it others have measured.

A share is a measurement that was published by somebody who has the machine, of the engine that runs
there in this project (vLLM, MLX) where one was found; ``tests/mlx_receiver/planning`` recomputes
them from the published figures. None is fitted to the set-up that ``docs/planning.md`` compares
with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from mlx_receiver.planning.cost import Link
from mlx_receiver.planning.models import Model
from mlx_receiver.wire.profile import Decode, Prefill, Profile

#: Of the memory, what an engine may use: ``--gpu-memory-utilization`` in vLLM's recipes for a
#: Spark; what macOS leaves to the GPU is near that.
USABLE: Final = 0.85

#: Bytes of an activation.
_ACTIVATION: Final = 2


@dataclass(frozen=True, slots=True)
class Device:
    """One machine: operations and bytes of memory a second, as its maker says, and its memory.

    Shares: of the operations that products of 16-bit matrices reach (``matrices``), attention
    (``attention``) and products with experts' matrices (``experts``); of the bandwidth that
    decoding one text of a model without experts reaches (``reads``), and a plain pass over memory
    (``passes``). ``routing`` is the seconds that a layer with experts adds to a decode step,
    ``chunk`` the most tokens that the engine prefills in one step, ``peers`` the bytes a second
    between several such machines; 0: they are not joined.
    """

    title: str
    flops: float
    bandwidth: float
    memory: float
    matrices: float
    attention: float
    experts: float
    reads: float
    passes: float
    routing: float
    chunk: int
    peers: float = 0.0
    sources: tuple[str, ...] = ()

    def profile(self, model: Model, count: int = 1) -> Profile:
        """How fast ``count`` of them compute the model, each a part of every layer. Raises
        ValueError where they cannot."""
        if count > 1 and not self.peers:
            raise ValueError(f"how several of {self.title} compute together is not known")
        return Profile(
            device=self.title if count == 1 else f"{count} x {self.title}",
            model=model.name,
            prefill=self._prefill(model, count),
            decode=self._decode(model, count),
            source="hardware",
            kv_bytes=max(0, int(count * self.memory * USABLE - model.nbytes)),
            bandwidth=int(count * self.bandwidth * self.reads),
        )

    def _prefill(self, model: Model, count: int) -> Prefill:
        flops, bandwidth = count * self.flops, count * self.bandwidth * self.passes
        weights = model.weights
        token = (2 * weights.dense + model.token) / (flops * self.matrices)
        token += 2 * weights.routed / (flops * self.experts)
        token += _ACTIVATION * model.moved / bandwidth
        if count > 1:
            # Each layer's two sums over all machines: an all-reduce passes each number twice, less
            # one machine's part.
            passed = 4 * model.layers * model.hidden * _ACTIVATION * (count - 1) / count
            token += passed / self.peers
        # A chunk takes no less than reading the weights. That is all of a short one, and overlaps
        # with computing a full one: between them runs the line.
        step = (model.step_bytes + weights.experts * model.expert_bits / 8) / bandwidth
        pair = model.pair / (flops * self.attention)
        return Prefill(step, max(0.0, token - step / self.chunk), pair, self.chunk)

    def _decode(self, model: Model, count: int) -> Decode:
        bandwidth = count * self.bandwidth * self.reads
        weights = model.weights
        # Computing overlaps with reading for the first text, and not for further ones.
        computed = 2 * (weights.dense + weights.head) / (count * self.flops * self.matrices)
        step = max(0.0, model.step_bytes / bandwidth - computed) + model.routers * self.routing
        row = model.row_bytes / bandwidth + computed
        return Decode(step, row, model.context_bytes / bandwidth)


#: MLX's products of bf16 matrices on an M3 Ultra with 60 of 80 cores, 4,096 rows: 18.7 TFLOP/s
#: (median of the shapes in ml-explore/mlx#3196), of 26 * 60 / 80.
_MLX_MATRICES: Final = 0.96
#: ``mx.fast.scaled_dot_product_attention`` beside a matrix product, Llama-3 8B's shape from 4k to
#: 32k: 88 to 95 % (raullenchai/Rapid-MLX#258).
_MLX_ATTENTION: Final = 0.96 * 0.9
#: llama.cpp, gpt-oss-20b on an M3 Ultra: 2,816 tokens a second of prompts of 2,048
#: (ggml-org/llama.cpp, discussion 15396).
_MAC_EXPERTS: Final = 0.63
#: mlx-lm, Qwen3.6-35B-A3B 8-bit on an M3 Ultra: 74.7 tokens a second (raullenchai/Rapid-MLX#472),
#: less what reading takes, for each of 40 layers. llama.cpp's gpt-oss-20b (as above, 115.5) gives
#: 0.20 ms.
_MAC_ROUTING: Final = 0.216e-3
#: MLX's copy of a 2 GB array on an M3 Ultra: 669 GB/s (pokgak.xyz, "MLX inference throughput gap").
_MLX_PASSES: Final = 0.82
#: mlx-lm's ``prefill_step_size``.
_MLX_CHUNK: Final = 2048

DEVICES: Final = {
    "spark": Device(
        title="DGX Spark", flops=100e12, bandwidth=273e9, memory=128e9,
        matrices=0.955, attention=0.955, experts=0.18, reads=0.727, passes=0.85,
        routing=0.12e-3, chunk=8192, peers=20.95e9,
        sources=(
            "100 TFLOP/s fp16, 273 GB/s: blog.exolabs.net/nvidia-dgx-spark",
            "matrices: cuBLAS, fp16, 8192^3, 791 products in 9.1 s of a burn-in"
            " (GuigsEvt/dgx_spark_config#1); attention is taken to be as fast",
            "experts: vLLM 0.28, Qwen3.6-35B-A3B NVFP4, 8k prompts, 6,265 tokens/s"
            " (vllm-project/recipes#918)",
            "reads: vLLM, Qwen3-8B bf16, 13.1 tokens/s (lyb.re, 2026-03-10)",
            "routing: vLLM, gpt-oss-120b MXFP4, 33 to 34 tokens/s (NVIDIA/dgx-spark-playbooks#79),"
            " less what reading takes",
            "passes: a kernel that reads, 231 to 234 GB/s (antirez/ds4#773)",
            "chunk: vLLM's max_num_batched_tokens for a server with that much memory",
            "peers: NCCL over ConnectX-7, 20.95 GB/s (NVIDIA/dgx-spark-playbooks#25)",
        ),
    ),
    "m3-ultra": Device(
        title="M3 Ultra", flops=26e12, bandwidth=819e9, memory=256e9,
        matrices=_MLX_MATRICES, attention=_MLX_ATTENTION, experts=_MAC_EXPERTS,
        reads=0.807, passes=_MLX_PASSES, routing=_MAC_ROUTING, chunk=_MLX_CHUNK,
        sources=(
            "26 TFLOP/s fp16, 819 GB/s (80 cores): blog.exolabs.net/nvidia-dgx-spark",
            "reads: MLX, Gemma-3-12B fp16, 28.09 tokens/s"
            " (Memetica-Corporation/gemma-deep-study, benchmark_summary.md)",
        ),
    ),
    "m4-max": Device(
        title="M4 Max", flops=18.4e12, bandwidth=546e9, memory=128e9,
        matrices=_MLX_MATRICES, attention=_MLX_ATTENTION, experts=_MAC_EXPERTS,
        reads=0.768, passes=_MLX_PASSES, routing=_MAC_ROUTING, chunk=_MLX_CHUNK,
        sources=(
            "18.4 TFLOP/s, 546 GB/s (40 cores):"
            " skorppio.com/blog/apple-m5-max-vs-nvidia-ai-deep-dive",
            "reads: llama.cpp, LLaMA 7B F16, 31.64 tokens/s (ggml-org/llama.cpp, discussion 4167);"
            " the other shares are the M3 Ultra's, measured with the same kernels",
        ),
    ),
    "m5-max": Device(
        title="M5 Max", flops=70e12, bandwidth=614e9, memory=128e9,
        matrices=_MLX_MATRICES, attention=_MLX_ATTENTION, experts=_MAC_EXPERTS,
        reads=0.75, passes=_MLX_PASSES, routing=_MAC_ROUTING, chunk=_MLX_CHUNK,
        sources=(
            "614 GB/s (40 cores): support.apple.com/en-us/126318; 70 TFLOP/s is others' estimate"
            " (skorppio.com, as above), near the \"up to 4x\" an M4 Max that Apple says",
            "reads: rates \"within 20-30 %\" of the bandwidth (eval-apple-models.vercel.app); the"
            " other shares are the M3 Ultra's, which has other matrix units: the least certain",
        ),
    ),
}  # fmt: skip

#: Of an Ethernet frame, what TCP carries for its user, with the usual MTU of 1,500.
_ETHERNET: Final = 1448 / 1538
#: Seconds for a word and its answer by TCP between two Macs
#: (jeffgeerling.com, "1.5 TB of VRAM on Mac Studio").
_ROUND_TRIP: Final = 300e-6
#: TCP over a Thunderbolt 4 cable, of 40 Gbit/s: 16.4 (jiribrejcha.net, "Direct 20 Gbps
#: connection").
#: For a Thunderbolt 5 cable, of 80, the same share is assumed.
_THUNDERBOLT: Final = 16.4 / 40

LINKS: Final = {
    "10gbe": Link(10e9 / 8 * _ETHERNET, _ROUND_TRIP),
    "2.5gbe": Link(2.5e9 / 8 * _ETHERNET, _ROUND_TRIP),
    "1gbe": Link(1e9 / 8 * _ETHERNET, _ROUND_TRIP),
    "thunderbolt-5": Link(80e9 / 8 * _THUNDERBOLT, _ROUND_TRIP),
    # A MacBook Pro on Wi-Fi 6, 758 Mbit/s (macitynet.it, February 2022); the round trip is assumed.
    "wi-fi": Link(758e6 / 8, 3e-3),
}
