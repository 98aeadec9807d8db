import subprocess
import sys

SLOW = ('matplotlib', 'sklearn', 'scipy.stats', 'scipy.optimize', 'jinja2', 'nibabel', 'pydicom')
PROGRAM = f"""
import sys
import covidjax.experiment.runs
print(*(name for name in {SLOW} if name in sys.modules))
"""


def test_slow_packages_are_not_imported_before_the_first_step():
    loaded = subprocess.run([sys.executable, '-c', PROGRAM], capture_output=True, text=True, check=True, timeout=300)
    assert loaded.stdout.split() == []
