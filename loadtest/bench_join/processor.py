"""Inside the measured engine: vLLM's interface to forced answers.

Covers: which requests are forced. Does not cover: one row of logits (`loadtest.bench_join.forcing`).

An engine started with this class among its `logits_processors` forces requests whose sampling parameters say so in
`extra_args`; all others are untouched.
"""

from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from loadtest.bench_join.forcing import ForcedAnswer, read_forced


class ForcedAnswers(AdapterLogitsProcessor):
    """All requests' parts; vLLM makes one per engine."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what `read_forced` cannot read.

        Raises:
            ValueError: The field is not what `FIELD` says.
        """
        read_forced(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """Never: greedy requests are the ones that are forced."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> ForcedAnswer | None:
        """The part of one request, if it has one."""
        return read_forced(params.extra_args)
