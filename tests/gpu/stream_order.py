"""Use memory of one stream on another, with and without an event, on the pretended device."""

from __future__ import annotations

from pretended_cuda import PretendedCuda  # before torch

# isort: split
import torch

import qtorch.data.threads  # noqa: F401  # the pretended device replaces a part of it


def fetch(*, waits: bool) -> list[float]:
    """Copy what the default stream has computed to the host, on another stream."""
    device = torch.device("cuda:0")
    stream = torch.cuda.Stream(device)
    values = torch.ones(3).to(device) * 2
    if waits:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        stream.wait_event(event)
    with torch.cuda.stream(stream):
        numbers: list[float] = values.cpu().tolist()
    return numbers


def main() -> None:
    with PretendedCuda():
        assert fetch(waits=True) == [2, 2, 2]
        try:
            fetch(waits=False)
        except RuntimeError as error:
            print(error)


if __name__ == "__main__":
    main()
