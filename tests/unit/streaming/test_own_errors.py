"""An error of a reading or encoding task reaches the command as it was raised."""

from __future__ import annotations

import pytest
from ray.exceptions import RayTaskError

from orpo_ray.errors import UserError
from orpo_ray.streaming.pipeline import own_errors

WRONG = UserError("rows 0 to 9 cannot be read", field="a.parquet", fix="write it again")


def of_task(cause: Exception) -> RayTaskError:
    return RayTaskError("read", "Traceback (most recent call last): ...", cause)


@pytest.mark.parametrize("raised", [of_task(WRONG).as_instanceof_cause(), of_task(of_task(WRONG))])
def test_an_error_of_the_user_arrives_as_itself(raised: Exception) -> None:
    assert str(raised) != str(WRONG)
    with pytest.raises(UserError) as error, own_errors():
        raise raised
    assert error.value is WRONG


def test_other_errors_stay_as_they_are() -> None:
    raised = of_task(OSError("lost")).as_instanceof_cause()
    with pytest.raises(OSError) as error, own_errors():  # noqa: PT011 - which one is checked below
        raise raised
    assert error.value is raised
