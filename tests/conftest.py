"""What tests of several rooms share."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

# Set before anything imports transformers or vLLM: tests never reach for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LEARNONCE_MODEL_HOME", str(ROOT / ".models"))
