"""Distribution terms: losses of a model's average distributions, added to the loss of each token."""

from .base import DistributionTerm, Moments, Statistics, TermSum
from .columns import ChiSquared, TokenL2, UnigramKL, VocabularyMMD, random_fourier_features
from .constraint import AtMost
from .delayed import Delayed
from .floors import noise_floor
from .gaps import PunctuationGap, SentenceLength
from .on_policy import OnPolicy, ReferenceKL
from .pull import TermLoss
from .rates import Entropy, NGrams, PunctuationRate
from .run import exact
from .texts import TextMMD
from .transport import EmbeddingTransport
from .weighing import gains

__all__ = [
    "AtMost",
    "ChiSquared",
    "Delayed",
    "DistributionTerm",
    "EmbeddingTransport",
    "Entropy",
    "Moments",
    "NGrams",
    "OnPolicy",
    "PunctuationGap",
    "PunctuationRate",
    "ReferenceKL",
    "SentenceLength",
    "Statistics",
    "TermLoss",
    "TermSum",
    "TextMMD",
    "TokenL2",
    "UnigramKL",
    "VocabularyMMD",
    "exact",
    "gains",
    "noise_floor",
    "random_fourier_features",
]
