"""Every law, on every registered mixer."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import slipstream as ss
from slipstream.laws import LAWS, Subject
from slipstream.laws.modes import step_is_captured_whole

IN_PROCESS = [law for law in LAWS if law is not step_is_captured_whole]


@pytest.mark.parametrize("name", sorted(ss.mixers()))
@pytest.mark.parametrize("law", IN_PROCESS, ids=lambda law: law.__name__)
def test_law(law, name):
    torch.set_num_threads(1)
    law(Subject(ss.mixers()[name]))


PROGRAM = """
import json, torch, slipstream as ss
from slipstream.laws.subject import judge
from slipstream.laws.modes import step_is_captured_whole as law
torch.set_num_threads(1)
print(json.dumps({name: judge(law, cls) for name, cls in ss.mixers().items()}))
"""


def test_steps_are_captured_whole():
    """In a process of its own: run-time shape checks are not part of what is captured."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=580, check=True)
    complaints = {name: c for name, c in json.loads(done.stdout).items() if c}
    assert complaints == {}
