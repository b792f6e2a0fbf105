"""Chains of stages: composed by Hydra, run in one job or stage by stage, resumable at any point.

``compose`` turns a command line into a configuration that ``schema`` and ``structured`` type, ``job`` makes a ``Job`` of it.
A stage kind is a subclass of ``Stage`` (``start_stages``, ``recipe_stage``). ``checks`` find what is wrong, ``compare`` what
has changed, ``manifest`` knows what is finished, and ``run.Pipeline`` is what a recipe YAML names.
"""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "FollowingSettings": "schema",
        "Job": "job",
        "Pipeline": "run",
        "RecipeSettings": "recipe_stage",
        "RecipeStage": "recipe_stage",
        "Stage": "job",
        "StageSettings": "schema",
    },
)
