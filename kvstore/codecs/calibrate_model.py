"""Run a model over calibration text, and keep what the fit needs.

Covers: cutting text, queries, KV, how much the model's answer depends on every token's K and V; the model's answer
with other KV in the cache. Does not cover: what is made of it (`kvstore.codecs.calibrate_fit`).
Shape letters: L layers, T tokens, N KV heads, Q query heads, H head dimension, C = N * H, W = 2 * L bands
(K of layer 0, V of layer 0, K of layer 1, ...), S next tokens, U vocabulary.

How much the answer depends on K and V: the Kullback-Leibler divergence of next-token distributions that a small error
`d` of the cache causes is `d' F d / 2`, where F is the Fisher information. With random vectors of covariance
`diag(p) - p p'` as gradients of the logits, one backward pass draws vectors of mean square F.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from cluster.errors import CallerError

SKIPPED_TOKENS: Final = 8
"""At a sequence's start: values there are larger than all others together, and the first is stored exactly."""
_PREFILL_TOKENS: Final = 1024
"""Computed at once: bounds the memory for attention."""


class CalibrationError(CallerError):
    """A model or texts from which no profile can be made."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Geometry:
    """What the model says about its KV."""

    num_layers: int
    num_kv_heads: int
    num_heads: int
    head_dim: int
    inv_freq: torch.Tensor
    """Float64, half the rotary dimension of them."""

    @property
    def num_channels(self) -> int:
        """Values per token of one layer's K or V."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, eq=False, kw_only=True)
class Queries:
    """Moments of un-rotated queries, and what the output projection makes of V."""

    mean_LQH: torch.Tensor
    second_moment_LQHH: torch.Tensor
    output_LQHH: torch.Tensor
    """`W_o' W_o` of every query head."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """One piece of calibration text after the model has read it."""

    kv_WTC: torch.Tensor
    """Float32, K un-rotated."""
    gradient_WTC: torch.Tensor | None
    """Float32; mean square: Fisher information of one following token. None: not asked for."""
    following: tuple[int, ...]
    """Ids of the tokens behind the context."""
    answer_SU: torch.Tensor
    """Logarithms of the next tokens' probabilities."""


class CalibrationModel:
    """A Llama-like model of transformers, in float32 on the CPU.

    Args:
        path: Its folder, or its name.
        context_tokens: Of every piece, whose KV is looked at.
        following_tokens: Of every piece, behind those: what is predicted with that KV.

    Raises:
        CalibrationError: Not such a model.
    """

    def __init__(self, path: Path, *, context_tokens: int, following_tokens: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._context_tokens, self._piece_tokens = context_tokens, context_tokens + following_tokens
        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.geometry = _geometry(self._model)

    def cut(self, texts: Sequence[str], *, count: int) -> list[list[int]]:
        """`count` pieces of context and what follows: texts in turn, evenly spread over each.

        Raises:
            CalibrationError: A text is shorter than one piece.
        """
        length = self._piece_tokens
        pieces: list[list[list[int]]] = []
        for index, text in enumerate(texts):
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) < length:
                raise CalibrationError(f"text {index + 1} has {len(ids)} tokens; {length} are the least")
            wanted = count // len(texts) + (index < count % len(texts))
            stride = (len(ids) - length) / max(wanted - 1, 1)
            pieces.append([ids[int(k * stride) : int(k * stride) + length] for k in range(wanted)])
        turns = max(len(of_text) for of_text in pieces)
        return [of_text[turn] for turn in range(turns) for of_text in pieces if turn < len(of_text)]

    @torch.no_grad()
    def queries(self, pieces: Sequence[Sequence[int]], *, on_piece: Callable[[], None]) -> Queries:
        """Moments of the queries over some pieces' contexts."""
        shape = self.geometry
        heads = (shape.num_heads, shape.head_dim)
        first = torch.zeros(shape.num_layers, *heads, dtype=torch.float64)
        second = torch.zeros(shape.num_layers, *heads, shape.head_dim, dtype=torch.float64)
        hooks = []

        def keep(layer: int) -> Callable[[Any, Any, torch.Tensor], None]:
            def of_output(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
                q_TQH = output[0].double().reshape(-1, *heads)[SKIPPED_TOKENS:]
                first[layer] += q_TQH.sum(0)
                second[layer] += torch.einsum("tqh,tqg->qhg", q_TQH, q_TQH)

            return of_output

        layers = self._model.model.layers
        for layer, block in enumerate(layers):
            source = getattr(block.self_attn, "q_norm", block.self_attn.q_proj)
            hooks.append(source.register_forward_hook(keep(layer)))
        try:
            for piece in pieces:
                self._model.model(input_ids=torch.tensor([piece[: self._context_tokens]]), use_cache=False)
                on_piece()
        finally:
            for hook in hooks:
                hook.remove()
        count = len(pieces) * (self._context_tokens - SKIPPED_TOKENS)
        projections = [block.self_attn.o_proj.weight.double().T.reshape(*heads, -1) for block in layers]
        output_LQHH = torch.stack([each_QHD @ each_QHD.transpose(1, 2) for each_QHD in projections])
        return Queries(mean_LQH=first / count, second_moment_LQHH=second / count, output_LQHH=output_LQHH)

    def read(self, piece: Sequence[int], *, seed: int | None) -> Segment:
        """Read a context, then the tokens behind it; `seed`: of the gradients, None for none."""
        context, following = list(piece[: self._context_tokens]), tuple(piece[self._context_tokens :])
        cache = self._cache()
        with torch.no_grad():
            for start in range(0, len(context), _PREFILL_TOKENS):
                ids = torch.tensor([context[start : start + _PREFILL_TOKENS]])
                self._model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        rotated = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        gradient_WTC = None
        if seed is None:
            with torch.no_grad():
                answer_SU = torch.log_softmax(self._logits(rotated, following), -1)
        else:
            for k, v in rotated:
                k.requires_grad_(True)
                v.requires_grad_(True)
            logits_SU = self._logits(rotated, following)
            answer_SU = torch.log_softmax(logits_SU.detach(), -1)
            leaves = [tensor for pair in rotated for tensor in pair]
            drawn_SU = _fisher_draw(answer_SU, seed=seed) / len(following) ** 0.5
            gradients = torch.autograd.grad(logits_SU, leaves, drawn_SU)
            gradient_WTC = self._bands(gradients)
        kv_WTC = self._bands([tensor.detach() for pair in rotated for tensor in pair])
        return Segment(kv_WTC=kv_WTC, gradient_WTC=gradient_WTC, following=following, answer_SU=answer_SU)

    @torch.no_grad()
    def divergence(self, segment: Segment, kv_WTC: torch.Tensor) -> float:
        """Mean KL divergence of the next tokens, in nats, with `kv_WTC` in place of the context's KV."""
        shape = self.geometry
        rotated = []
        for layer in range(shape.num_layers):
            k, v = (
                kv_WTC[2 * layer + kv].reshape(-1, shape.num_kv_heads, shape.head_dim).transpose(0, 1) for kv in (0, 1)
            )
            rotated.append((_rotate(k, shape.inv_freq, sign=1)[None], v[None]))
        answer_SU = torch.log_softmax(self._logits(rotated, segment.following), -1)
        exact_SU = segment.answer_SU
        return float((exact_SU.exp() * (exact_SU - answer_SU)).sum(-1).mean())

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._model.config)

    def _logits(self, rotated: Sequence[tuple[torch.Tensor, torch.Tensor]], ids: Sequence[int]) -> torch.Tensor:
        cache = self._cache()
        for layer, (k, v) in enumerate(rotated):
            cache.update(k, v, layer)
        hidden = self._model.model(input_ids=torch.tensor([list(ids)]), past_key_values=cache, use_cache=True)
        logits: torch.Tensor = self._model.lm_head(hidden.last_hidden_state[0])
        return logits

    def _bands(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """`[1, N, T, H]` by band to `[W, T, C]`, K un-rotated (which turns gradients as it turns keys)."""
        bands = []
        for index, tensor in enumerate(tensors):
            of_head = tensor[0] if index % 2 else _rotate(tensor[0], self.geometry.inv_freq, sign=-1)
            bands.append(of_head.transpose(0, 1).flatten(1))
        return torch.stack(bands)


def _geometry(model: Any) -> Geometry:
    config = model.config
    try:
        attention = model.model.layers[0].self_attn
        right = hasattr(attention, "q_proj") and hasattr(attention, "o_proj") and hasattr(model, "lm_head")
        inv_freq = model.model.rotary_emb.inv_freq
    except AttributeError as error:
        raise CalibrationError(f"{type(model).__name__} is not built like Llama: {error}") from error
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if not right or model.model.rotary_emb.attention_scaling != 1.0:
        raise CalibrationError(f"{type(model).__name__} is not built like Llama: its attention cannot be read")
    return Geometry(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        num_heads=config.num_attention_heads,
        head_dim=head_dim,
        inv_freq=inv_freq.double(),
    )


def _rotate(x_NTH: torch.Tensor, inv_freq: torch.Tensor, *, sign: int) -> torch.Tensor:
    """Rotate (1) or un-rotate (-1) from position 0 on; pairs are halves apart, as in transformers."""
    angles = torch.arange(x_NTH.shape[1], dtype=torch.float64)[:, None] * inv_freq
    cosine, sine = angles.cos().float(), sign * angles.sin().float()
    half = len(inv_freq)
    low, high, rest = x_NTH[..., :half], x_NTH[..., half : 2 * half], x_NTH[..., 2 * half :]
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine, rest], -1)


def _fisher_draw(answer_SU: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Random vectors with covariance `diag(p) - p p'`, one per next token."""
    probability = answer_SU.exp()
    noise = torch.randn(probability.shape, generator=torch.Generator().manual_seed(seed)) * probability.sqrt()
    return noise - probability * noise.sum(-1, keepdim=True)
