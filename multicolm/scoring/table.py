from multicolm.score_table import ScoreTable  # noqa

__all__ = ["ScoreTable"]
