"""lm-evaluation-harness with tasks that compare answers to a picture: `loglikelihood`, which its own class lacks.

    pip install lm_eval
    python examples/lm_eval_model.py --model visualrwkv --model_args pretrained=visualrwkv-7-0b1 \
        --include_path tasks --tasks my_task --apply_chat_template --device cpu

The options are the harness's own. The model class `visualrwkv` is its `hf-multimodal`, and answers such tasks by
`model.score`: a picture is read once for all answers to a question, and their probabilities come from the state.
"""

from collections.abc import Sequence

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.utils import resize_image
from tqdm import tqdm

from visualrwkv_hf import StateStore


@register_model("visualrwkv")
class VisualRWKVMultimodalLM(HFMultimodalLM):
    """The harness's class for models with pictures, with log-likelihoods."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each request the log-likelihood of its answer, and whether greedy decoding begins with it.

        Args:
            requests: their `args` are the prompt, the answer, and for pictures `{"visual": [...]}`.
            disable_tqdm: whether no progress is shown.

        Raises:
            ValueError: a prompt or an answer is empty.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        of_text = [number for number, request in enumerate(requests) if len(request.args) < 3]
        if of_text:
            scores = super().loglikelihood([requests[number] for number in of_text], disable_tqdm)
            for number, score in zip(of_text, scores, strict=True):
                found[number] = score
        questions: dict[tuple[str, int], list[int]] = {}
        for number in sorted({*range(len(requests))} - {*of_text}):
            context, _, extra = requests[
                number
            ].args  # the harness gives all answers to a question the same object
            questions.setdefault((context, id(extra)), []).append(number)
        progress = tqdm(questions.items(), desc="Scoring answers", disable=disable_tqdm or self.rank != 0)
        for (context, _), numbers in progress:
            answers = [requests[number].args[1] for number in numbers]
            scores = self._score(context, answers, requests[numbers[0]].args[2]["visual"])
            for number, score in zip(numbers, scores, strict=True):
                found[number] = score
        return found

    def _score(self, context: str, answers: Sequence[str], pictures: Sequence) -> list[tuple[float, bool]]:
        if not context.strip():
            raise ValueError("A question about a picture needs a prompt.")
        prompt = context.rstrip()
        texts = [context[len(prompt) :] + answer for answer in answers]
        if self.chat_applied:  # the harness then leaves out the space that every answer begins with
            texts = [text if text[:1].isspace() else f" {text}" for text in texts]
        sizes = self.image_width, self.image_height, self.image_max_side
        inputs = self.tok_batch_multimodal_encode([prompt], [[resize_image(one, *sizes) for one in pictures]])
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        store = StateStore()
        log_probs = self.model.score(inputs, ids, state_store=store).log_probs[0].tolist()
        longest = max(map(len, ids))
        output = self.model.generate(
            **inputs, max_new_tokens=longest, do_sample=False, state_store=store
        )  # from the state that `score` has left
        written = output[0, inputs["input_ids"].shape[1] :].tolist()
        return [(log_prob, written[: len(own)] == own) for log_prob, own in zip(log_probs, ids)]


if __name__ == "__main__":
    cli_evaluate()
