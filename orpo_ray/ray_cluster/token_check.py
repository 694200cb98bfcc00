"""Ask a cluster once whether it takes the token of this process, which Ray itself would ask for 40 seconds."""

from __future__ import annotations

import os

import grpc
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import AuthenticationError

from orpo_ray.errors import UserError
from orpo_ray.ray_cluster.private import TOKEN_VARIABLES

ANSWER_SECONDS = 5.0
_HOW = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token (or RAY_AUTH_TOKEN to it)"


def check_token(address: str) -> None:
    """Check that a cluster takes this process's token, or asks for none.

    What else may be wrong with the cluster is left to `ray.init`.

    Args:
        address: `host:port` of the cluster, where something listens.

    Raises:
        UserError: the cluster asks for a token, and none or another one was given; or none can be read.
    """
    try:
        with init_grpc_channel(address) as channel:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=ANSWER_SECONDS)
    except AuthenticationError:
        raise UserError(
            f"RAY_AUTH_MODE is token, and there is no token in {_place()}", field="RAY_ADDRESS", value=address, fix=_HOW
        ) from None
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            return
        problem = "the cluster asks for a token, and none was given"
        if is_token_auth_enabled():
            problem = f"the cluster refuses the token in {_place()}"
        raise UserError(problem, field="RAY_ADDRESS", value=address, fix=_HOW) from None


def _place() -> str:
    """Say where Ray takes the token from, in its order. The token itself is shown nowhere."""
    token, path = (os.environ.get(name) for name in TOKEN_VARIABLES)
    return TOKEN_VARIABLES[0] if token else path or "~/.ray/auth_token"
