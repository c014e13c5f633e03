"""Exercises whose answers can be verified: families, levels, splits that no prompt crosses; docs/exercises.md."""

from dsjax.rl.exercises.config import ExercisesConfig as ExercisesConfig
from dsjax.rl.exercises.config import FamilyConfig as FamilyConfig
from dsjax.rl.exercises.config import families_of as families_of
from dsjax.rl.exercises.exercise import SPLITS as SPLITS
from dsjax.rl.exercises.exercise import Exercise as Exercise
from dsjax.rl.exercises.exercise import Family as Family
from dsjax.rl.exercises.exercise import Split as Split
from dsjax.rl.exercises.exercise import distinct as distinct
from dsjax.rl.exercises.exercise import draw as draw
from dsjax.rl.exercises.exercise import exercise_of as exercise_of
from dsjax.rl.exercises.form import AnswerForm as AnswerForm
