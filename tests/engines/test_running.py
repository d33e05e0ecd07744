"""How engines are installed and tidied up, as far as that shows without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import with_engines


def test_a_command_that_fails_is_a_reason_of_one_line() -> None:
    code = "import sys; print('noise\\nERROR: no wheel\\nmore', file=sys.stderr); sys.exit(3)"
    with pytest.raises(with_engines.NotHere) as caught:
        with_engines.run([sys.executable, "-c", code], 60)
    assert str(caught.value).endswith("failed: ERROR: no wheel")
    assert "\n" not in str(caught.value)


def test_a_command_that_never_ends_is_a_reason_too() -> None:
    with pytest.raises(with_engines.NotHere, match="took more than 1 s"):
        with_engines.run([sys.executable, "-c", "import time; time.sleep(60)"], 1)


def test_what_a_run_leaves_behind_is_stopped_and_nothing_else() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [
        subprocess.Popen(sleep, env={with_engines.MARK: mark}, start_new_session=True)
        for mark in ("this run", "another run")
    ]
    try:
        assert with_engines.stop_what_is_left("this run") == 1
        assert processes[0].poll() is not None and processes[1].poll() is None
        assert with_engines.stop_what_is_left("this run") == 0
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=30)


def test_every_test_of_a_missing_engine_is_one_that_says_why(tmp_path: Path) -> None:
    conftest = Path(with_engines.__file__).with_name("conftest.py")
    (tmp_path / "conftest.py").write_text(conftest.read_text())
    tests = (
        "import pytest\n@pytest.mark.parametrize('i', range(5))\ndef test_it(i, vllm_python): ..."
    )
    (tmp_path / "test_vllm_server.py").write_text(tests)
    (tmp_path / "test_else.py").write_text("def test_it(): ...")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"MULTICOLM_VLLM_MISSING": "no wheel", "PATH": ""},
    )
    assert done.returncode == 0, done.stdout
    assert "vLLM is not here (no wheel); it and 4 more tests wait" in done.stdout
    assert "1 passed, 1 skipped, 4 deselected" in done.stdout
