"""Fresh KV for chosen tokens of one request, through the engine's own model and attention backend.

Covers: virtual sequences, stopping in the middle of the model, and a proof at start-up that its keys move as its rotary
modules say.
Does not cover: which tokens (`kvstore.engine.join.run`), scores (`kvstore.engine.join.probe`), which engines do not
join (`kvstore.engine.support`).

Every run of consecutive tokens is a sequence of its own to the backend: its query is the run, its context everything
before it in the request's blocks, and all have the same row of the block table. A layer writes all fresh K and V before
it attends, so later runs see earlier ones of the same forward. Tokens depend on earlier ones only: a list of positions
that is cut in order and forwarded piece by piece gives what one forward gives.

The last layer's attention, output and everything behind are not needed: a hook in front of its attention writes K and
V and ends the forward.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvstore.engine.join.probe import Observer
from kvstore.engine.join.rotation import RotaryModule, Rotation
from kvstore.engine.paging import PagedKv, UnsupportedLayoutError
from kvstore.engine.support import refusal_of_joins

_PROOF_TOKENS: Final = 16
_PROOF_SHIFT: Final = 37
_PROOF_TOLERANCE: Final[Mapping[torch.dtype, float]] = {
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
"""Largest relative error of moved keys, by dtype: a few times what rounding gives."""


class _StopForward(Exception):
    """No error: raised by a hook to end a forward whose rest nobody needs."""


class ModelForward:
    """The engine's model, run for tokens of one request at a time. For the engine's thread.

    Args:
        runner: vLLM's model runner, its KV allocated.
        layers: Names of the attention layers in order of depth.
        blocks: The engine's blocks.

    Raises:
        UnsupportedLayoutError: Requests of this model cannot be joined; the message says why.
    """

    def __init__(self, runner: Any, *, layers: Sequence[str], blocks: PagedKv) -> None:
        self._config = runner.vllm_config
        if reason := refusal_of_joins(self._config):
            raise UnsupportedLayoutError(reason)
        self._blocks = blocks
        self._device = torch.device(runner.device)
        self._model: torch.nn.Module = runner.get_model()
        modules = self._config.compilation_config.static_forward_context
        self._attention = [modules[name] for name in layers]
        self._names = tuple(layers)
        if any(layer.kv_sharing_target_layer_name is not None for layer in self._attention):
            raise UnsupportedLayoutError("layers share the KV of other layers")
        self._builders = _builders(runner, page_tokens=blocks.page_tokens)
        self.rotation = Rotation(_rotary_modules(self._model, self._attention))

    @property
    def num_layers(self) -> int:
        """Attention layers."""
        return len(self._names)

    def attention(self, layer: int) -> Any:
        """A layer's attention module."""
        return self._attention[layer]

    @torch.inference_mode()
    def run(
        self,
        token_ids: Sequence[int],
        *,
        positions: torch.Tensor,
        block_ids: Sequence[int],
        stop_layer: int | None = None,
        observers: Mapping[int, Observer] | None = None,
        rotate_by: int = 0,
    ) -> None:
        """Write fresh K and V of some tokens into their request's blocks, layers `[0, stop_layer)`.

        Args:
            token_ids: One per position.
            positions: Increasing positions in the request, int64 on the CPU. KV of all earlier positions is in place.
            block_ids: The request's blocks from token 0 on.
            stop_layer: Layer before which to stop; None computes all.
            observers: By layer, called as its K and V are written.
            rotate_by: Added to the positions that keys are rotated by, not to those where they are kept.
        """
        where = positions.to(self._device)
        slots = self._blocks.slots_at(block_ids, positions)
        common = _virtual_sequences(positions, pages=self._blocks.pages(block_ids).to(self._device), slots=slots)
        metadata: dict[str, Any] = {}
        for names, builder in self._builders:
            metadata |= dict.fromkeys(names, builder.build(0, common))
        last = (self.num_layers if stop_layer is None else stop_layer) - 1
        context = set_forward_context(
            metadata,
            self._config,
            num_tokens=len(positions),
            slot_mapping=dict.fromkeys(self._names, slots),
            skip_compiled=True,
        )
        with context, self._hooks(slots, last, observers or {}), suppress(_StopForward):
            self._model(
                input_ids=torch.tensor(token_ids, dtype=torch.int32, device=self._device),
                positions=where + rotate_by,
                intermediate_tensors=None,
                inputs_embeds=None,
            )
            raise RuntimeError("the model ended without reaching the attention of its last layer")

    @contextmanager
    def _hooks(self, slots: torch.Tensor, last: int, observers: Mapping[int, Observer]) -> Iterator[None]:
        handles = []
        try:
            for layer in {last, *observers}:
                hook = self._hook(layer, slots, observers.get(layer), is_last=layer == last)
                handles.append(self._attention[layer].register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(
        self, layer: int, slots: torch.Tensor, observer: Observer | None, *, is_last: bool
    ) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            query, key, value = (x.view(len(slots), -1, module.head_size) for x in args[:3])
            module.impl.do_kv_cache_update(module, key, value, module.kv_cache, slots)
            if observer is not None:
                observer(query, key, value)
            if is_last:
                raise _StopForward

        return hook

    def prove_rotation(self, block_ids: Sequence[int]) -> None:
        """Compute a few tokens at two places and compare K that was moved with K that was computed there.

        Attention sees distances only, so the same tokens give the same hidden states at both places, and their keys
        differ by the rotation alone, in every layer.

        Args:
            block_ids: Blocks that nobody uses, room for at least 16 tokens.

        Raises:
            UnsupportedLayoutError: They differ by more than rounding.
        """
        positions = torch.arange(_PROOF_TOKENS)
        token_ids = [(7 * index + 3) % 97 + 1 for index in range(_PROOF_TOKENS)]
        seen = []
        for shift in (0, _PROOF_SHIFT):
            self.run(token_ids, positions=positions, block_ids=block_ids, rotate_by=shift)
            seen.append(self._blocks.gather(block_ids, first=0, num_tokens=_PROOF_TOKENS).kv().clone())
        self.rotation.move(seen[0], base=0, start=_PROOF_SHIFT)
        moved, expected = (kv[:, 0].float().flatten(1) for kv in seen)
        error = (moved - expected).norm(dim=1) / expected.norm(dim=1)
        worst = int(error.argmax())
        if not float(error.max()) <= _PROOF_TOLERANCE[seen[0].dtype]:
            raise UnsupportedLayoutError(
                f"moved keys of layer {worst} differ from computed ones by {float(error[worst]):.2g} of their norm"
            )


def _builders(runner: Any, *, page_tokens: int) -> list[tuple[tuple[str, ...], Any]]:
    """Metadata builders of our own: the engine's keep buffers of the size of its own batches."""
    config = copy.copy(runner.vllm_config)
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    found = []
    for group in runner.attn_groups[0]:
        names, spec = tuple(group.layer_names), group.kv_cache_spec
        if spec.block_size != page_tokens:
            spec = spec.copy_with_new_block_size(page_tokens)
        builder = group.backend.get_builder_cls()(spec, list(names), config, torch.device(runner.device))
        found.append((names, builder))
    return found


def _rotary_modules(model: torch.nn.Module, attention: Sequence[torch.nn.Module]) -> list[RotaryModule | None]:
    """The rotary module beside each attention module."""
    wanted = {id(layer) for layer in attention}
    beside: dict[int, RotaryModule | None] = {}
    for parent in model.modules():
        children = dict(parent.named_children())
        for child in children.values():
            if id(child) in wanted:
                found = [other for other in children.values() if hasattr(other, "cos_sin_cache")]
                beside[id(child)] = found[0] if len(found) == 1 else None  # type: ignore[assignment]
    return [beside.get(id(layer)) for layer in attention]


def _virtual_sequences(positions: torch.Tensor, *, pages: torch.Tensor, slots: torch.Tensor) -> CommonAttentionMetadata:
    device = slots.device
    cuts = torch.nonzero(positions.diff() != 1).flatten() + 1
    edges = torch.cat([cuts.new_zeros(1), cuts, cuts.new_tensor([len(positions)])]).int()
    seq_lens = (positions[edges[1:].long() - 1] + 1).int()
    count = len(seq_lens)
    return CommonAttentionMetadata(
        query_start_loc=edges.to(device),
        query_start_loc_cpu=edges,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=count,
        num_actual_tokens=len(positions),
        max_query_len=int(edges.diff().max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=pages.int().expand(count, -1).contiguous(),
        slot_mapping=slots,
        positions=positions.to(device),
        is_prefilling=torch.ones(count, dtype=torch.bool),
    )
