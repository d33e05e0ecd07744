from .decoding.streaming import (
    Stream as Stream,
)
from .ensemble import (
    Ensemble as Ensemble,
)
from .ensemble import (
    load as load,
)
from .errors import (
    MulticolmError as MulticolmError,
)
from .generative import (
    GenerativeEnsemble as GenerativeEnsemble,
)
from .generative import (
    as_transformers as as_transformers,
)
from .policy.base import (
    MixPolicy as MixPolicy,
)
from .policy.base import (
    Needs as Needs,
)
from .policy.base import (
    NewTokens as NewTokens,
)
from .policy.base import (
    Policy as Policy,
)
from .policy.base import (
    SegmentPolicy as SegmentPolicy,
)
from .policy.base import (
    Segments as Segments,
)
from .policy.base import (
    SelectPolicy as SelectPolicy,
)
from .policy.base import (
    VerifyPolicy as VerifyPolicy,
)
from .policy.base import (
    register_policy as register_policy,
)
from .types import (
    Alternative as Alternative,
)
from .types import (
    Answer as Answer,
)
from .types import (
    Chat as Chat,
)
from .types import (
    Message as Message,
)
from .types import (
    Piece as Piece,
)
from .types import (
    Trace as Trace,
)
from .types import (
    TracedToken as TracedToken,
)
from .types import (
    Usage as Usage,
)
from .version import __version__ as __version__
from .views import (
    ModelNames as ModelNames,
)
from .views import (
    View as View,
)
from .views import (
    Views as Views,
)
