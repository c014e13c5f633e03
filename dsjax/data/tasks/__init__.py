"""Programming tasks without end: families, levels, hidden tests, and a split that no meaning crosses; docs/tasks.md."""

from dsjax.data.tasks.generate import Task as Task
from dsjax.data.tasks.generate import generate as generate
from dsjax.data.tasks.split import Split as Split
from dsjax.data.tasks.split import stream as stream
