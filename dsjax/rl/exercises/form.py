r"""How a question is put to a model, and where in its text the answer stands.

plain    prompt: the question, a line                      text: WORK #### ANSWER
think    prompt: DeepSeek-R1's conversation                text: <think> WORK </think> <answer> ANSWER </answer>
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from dsjax.config import UserError

# DeepSeek-R1 (arXiv 2501.12948), table 1.
CONVERSATION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant"
    " first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning"
    " process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think>"
    " reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_THINK = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)

Template = Literal["plain", "think"]


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """What stands around question and answer.

    Attributes:
        mark: what a solution has in front of its answer, as it is written there, blanks included; a text's answer is
            whatever stands behind its last mark (blanks at the ends of either do not count). Empty: all of a text is
            its answer. Not used by "think".
        template: "plain" or "think".
    """

    mark: str = "#### "
    template: Template = "plain"

    def validate(self) -> None:
        """Raises ``UserError`` for a mark that no text could be told by."""
        if self.mark and not self.mark.strip():
            raise UserError(f"answer_mark is {self.mark!r}; it must be empty or have something that is no blank")

    def prompt(self, question: str) -> str:
        """What a model reads."""
        return CONVERSATION.format(question=question.rstrip("\n.")) if self.template == "think" else question

    def solution(self, work: str, answer: str) -> str:
        """A whole text that has ``answer`` for its answer, with ``work`` in front of it where there is room for any."""
        if self.template == "think":
            return f" <think> {work.strip()} </think> <answer> {answer} </answer>"
        if not self.mark:
            return answer
        work = work.strip()
        return f"{work}\n{self.mark}{answer}" if work else f"{self.mark}{answer}"

    def answer(self, text: str, ended: bool) -> str | None:
        """What a text gives as its answer, without blanks around it; None: it gives none.

        Args:
            text: all that the model wrote.
            ended: it ended by itself. What was cut off gives no answer, since more might have followed.
        """
        if self.template == "think":
            before, tag, _ = text.rpartition("</answer>")
            _, begun, inside = before.rpartition("<answer>")
            return inside.strip() or None if tag and begun else None
        if not ended:
            return None
        mark = self.mark.strip()
        if not mark:
            return text.strip() or None
        _, found, behind = text.rpartition(mark)
        return behind.strip() or None if found else None

    def follows(self, text: str, ended: bool, *, work: bool) -> bool:
        """Whether a text has the form: everything is there once, in its order, with an answer.

        Args:
            text, ended: as in :meth:`answer`.
            work: something has to stand in front of the answer.
        """
        if self.template == "think":
            found = _THINK.fullmatch(text) if all(text.count(tag) == 1 for tag in TAGS) else None
            return found is not None and bool(found[2].strip()) and (bool(self.work(text)) or not work)
        if self.answer(text, ended) is None:
            return False
        mark = self.mark.strip()
        return not mark or (text.count(mark) == 1 and (bool(self.work(text)) or not work))

    def work(self, text: str) -> str:
        """What a text has in front of its answer, without blanks around it."""
        if self.template == "think":
            found = _THINK.fullmatch(text)
            return found[1].strip() if found else ""
        mark = self.mark.strip()
        return text.rpartition(mark)[0].strip() if mark else ""
