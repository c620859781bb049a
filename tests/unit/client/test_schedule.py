"""Learning rates against transformers' schedulers."""

import pytest
import torch
from transformers import get_scheduler

from cutlayer.client.schedule import learning_rate
from cutlayer.client.settings import Schedule, TrainSettings


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("warmup", [0, 4])
def test_every_step_has_the_rate_of_transformers(schedule: Schedule, warmup: int) -> None:
    settings = TrainSettings(steps=20, lr=0.3, schedule=schedule, warmup_steps=warmup)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if schedule is Schedule.CONSTANT else schedule.value
    theirs = get_scheduler(name, adamw, warmup, 20)
    for step in range(1, 21):
        assert learning_rate(step, 20, settings) == pytest.approx(adamw.param_groups[0]["lr"])
        adamw.step()
        theirs.step()
