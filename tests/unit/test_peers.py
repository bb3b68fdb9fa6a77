"""The back end's errors about a process that is gone."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from pretrain.peers import is_lost_peer, peers_present

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:2231"


def fail(error: Exception, world: int = 2) -> None:
    with peers_present(world, lambda: "Start again with --resume."):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        RuntimeError("Timed out waiting 8000ms for recv operation to complete"),
        dist.DistBackendError("NCCL communicator was aborted on rank 0."),
        dist.DistNetworkError("the server socket has gone"),
    ],
)
def test_a_process_that_is_gone_is_named_with_what_to_do(error):
    with pytest.raises(
        ConnectionError, match=r"lost another of the 2 processes \(.*\)\. Start again with --resume\."
    ):
        fail(error)


def test_other_errors_stay_what_they_are():
    mine = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not is_lost_peer(mine)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        fail(mine)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        fail(RuntimeError(GLOO), world=1)
    with pytest.raises(ValueError, match="gloo"):
        fail(ValueError("gloo"))
