"""A kind of knowledge: label knowledge whose teacher is sharpened or softened before it teaches."""

from dataclasses import dataclass

from recbole_fedkd.extend import LabelKnowledge, LabelSettings, register_knowledge, setting


@dataclass(frozen=True)
class SharpenedSettings(LabelSettings):
    """The key of label knowledge, and one more."""

    sharpness: float = setting(1.5, "> 0", "Knowledge sharpened: factor on the teacher's logits.")


@register_knowledge
class Sharpened(LabelKnowledge):
    """``--strategy=afd --knowledge=sharpened --sharpness=2``."""

    name = "sharpened"
    settings_type = SharpenedSettings

    def teacher(self, received, step):
        """Teacher's logits ``[batch, T]`` and mask ``[batch]``."""
        teacher, known = super().teacher(received, step)
        return (None, None) if teacher is None else (teacher * self.settings.sharpness, known)
