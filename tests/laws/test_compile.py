"""A step is captured whole by torch.compile, for every mixer: no graph break, no host synchronisation.

In a process of its own, since run-time shape checks are not part of what is captured.
"""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch, slipstream as ss
torch.set_num_threads(1)
for name, cls in ss.mixers().items():
    torch.manual_seed(0)
    torch._dynamo.reset()
    mixer = cls(cls.tiny).double().eval()
    x = torch.randn(2, 9, cls.tiny.d_model, dtype=torch.float64)
    with torch.no_grad():
        want = mixer(x)
        _, state = mixer.prefill(x[:, :6], mixer.init_state(2, 9))
        step = torch.compile(mixer.step, fullgraph=True, backend="eager")
        for t in range(6, 9):
            y, state = step(x[:, t : t + 1], state)
            torch.testing.assert_close(y, want[:, t : t + 1], rtol=1e-10, atol=1e-10)
    print("captured", name)
"""


def test_step_is_captured_whole():
    import slipstream as ss

    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=500, check=False)
    captured = [line.split()[1] for line in done.stdout.splitlines()]
    assert captured == list(ss.mixers()), done.stderr[-3000:]
