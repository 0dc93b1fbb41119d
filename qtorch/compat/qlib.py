"""Let a program's `import qlib` find qtorch, by one explicit line.

import qtorch.compat.qlib as qlib
qlib.install()
from qlib.workflow import R  # that of qtorch
"""

from qtorch.core.qlib.modules import init as init
from qtorch.core.qlib.modules import install as install
from qtorch.core.qlib.modules import uninstall as uninstall
