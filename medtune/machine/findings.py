"""What a check of the machine finds: fine, or what to do."""

from dataclasses import dataclass

# A run goes on in spite of a note, but not as one might think.
FINE, NOTE, WRONG = "fine", "note", "wrong"
GIB, MIB = 2**30, 2**20
# Of Qwen2.5-3B, the model of the guide.
MODEL, MODEL_BYTES = "Qwen2.5-3B", 6.2e9


@dataclass(frozen=True)
class Finding:
    grade: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.grade:5}  {self.subject:14}  {self.text}"
