"""Distribution terms: what is asked of a model's distributions beside the loss of each token."""

from .base import DistributionTerm, Moments, Statistics, TermSum
from .columns import ChiSquared, TokenL2, UnigramKL, VocabularyMMD, random_fourier_features
from .delayed import Delayed
from .gaps import PunctuationGap, SentenceLength
from .pull import TermLoss
from .rates import Entropy, NGrams, PunctuationRate
from .run import exact
from .transport import EmbeddingTransport

__all__ = [
    "ChiSquared",
    "Delayed",
    "DistributionTerm",
    "EmbeddingTransport",
    "Entropy",
    "Moments",
    "NGrams",
    "PunctuationGap",
    "PunctuationRate",
    "SentenceLength",
    "Statistics",
    "TermLoss",
    "TermSum",
    "TokenL2",
    "UnigramKL",
    "VocabularyMMD",
    "exact",
    "random_fourier_features",
]
