"""BentoML: one worker with adaptive batches. A batched endpoint takes one list, so a call is a list of one entry."""

import bentoml
from models import Models
from pydantic import Base64Bytes, BaseModel


class Call(BaseModel):
    task: str
    image: Base64Bytes


@bentoml.service(workers=1, traffic={"timeout": 120})
class Classifier:
    def __init__(self):
        self.models = Models()

    @bentoml.api(batchable=True, max_batch_size=16)
    def classify(self, calls: list[Call]) -> list[dict]:
        return self.models.answer([call.task for call in calls], [self.models.decode(call.image) for call in calls])
