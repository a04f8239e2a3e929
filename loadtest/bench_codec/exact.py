"""The embedded model in float32, and its exact KV: what every codec is held against.

Covers: one pass over a document that gives KV and log probabilities, going on over other KV.
Does not cover: codecs, texts.
Shape letters: as in `kvstore.codecs`; S tokens of a continuation, W words of the vocabulary.

Attention is causal: the KV of a document's first n tokens, and the probabilities behind them, are the same in any
longer pass. So one pass at the longest context serves all shorter ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

from loadtest.agreement import log_probabilities


class ExactModel:
    """A causal language model whose KV can be taken out and put back."""

    def __init__(self, network: Any) -> None:
        """`network`: a transformers model for causal language, in float32."""
        self._network = network.eval()

    @staticmethod
    def load(model: str) -> "ExactModel":
        """Read a model folder."""
        transformers.logging.disable_progress_bar()
        return ExactModel(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa"))

    @torch.inference_mode()
    def read(self, ids: Sequence[int], *, keep: Sequence[int], kv_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute a text from its start.

        Args:
            ids: The text's token ids.
            keep: Indices of the tokens behind which the log probabilities are kept.
            kv_tokens: How many first tokens' KV is kept.

        Returns:
            KV `[L, 2, T, N, H]` in float32, and log probabilities `[len(keep), W]`.
        """
        cache = DynamicCache(config=self._network.config)
        answer = self._network(
            torch.tensor([list(ids)]), past_key_values=cache, logits_to_keep=torch.tensor(list(keep), dtype=torch.long)
        )
        kv_L2TNH = torch.stack(
            [
                torch.stack([layer.keys[0, :, :kv_tokens], layer.values[0, :, :kv_tokens]]).transpose(1, 2)
                for layer in cache.layers
            ]
        )
        return kv_L2TNH, log_probabilities(answer.logits[0])

    @torch.inference_mode()
    def go_on(self, kv_L2TNH: torch.Tensor, following: Sequence[int]) -> torch.Tensor:
        """Log probabilities `[S, W]` behind each of the tokens that follow this KV (any dtype; not changed)."""
        return self.answer(kv_L2TNH, [following])[0]

    @torch.inference_mode()
    def answer(self, kv_L2TNH: torch.Tensor, questions: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """As `go_on`, for several continuations of the same KV."""
        cache = DynamicCache(config=self._network.config)
        for layer, (k_TNH, v_TNH) in enumerate(kv_L2TNH):
            keys, values = (part.transpose(0, 1)[None].float().contiguous() for part in (k_TNH, v_TNH))
            cache.update(keys, values, layer)
        answers = []
        for following in questions:
            answers.append(
                log_probabilities(self._network(torch.tensor([list(following)]), past_key_values=cache).logits[0])
            )
            cache.crop(-len(following))
        return answers


def kv_shape(model: str) -> tuple[int, int, int]:
    """Layers, KV heads and head dimension of a model folder."""
    config = AutoConfig.from_pretrained(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, head_dim


class Tokenizer:
    """Text to token ids, without special tokens."""

    def __init__(self, model: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def __call__(self, text: str) -> list[int]:
        """Token ids."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids
