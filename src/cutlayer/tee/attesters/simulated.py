"""Evidence of a machine that is none: a quote by software with this installation's measurement.

Only for development: the keys lie in `folder`, and whoever verifies sees SIMULATED.
"""

from cutlayer.errors import ConfigError
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence
from cutlayer.tee.measure import measure_package
from cutlayer.tee.synthetic_quoter import SyntheticQuoter
from cutlayer.tee.verifier import utc_now

__all__ = ["SimulatedAttester"]


@ATTESTERS.register("simulated")
class SimulatedAttester:
    """The synthetic quoter of `settings.folder`, made there when it is first asked."""

    def attest(self, settings: AttesterSettings, report_data: bytes) -> Evidence:
        """A quote that Intel's root refuses.

        Raises:
            ConfigError: no folder for its keys is named.
            StorageError: the folder is open to others, or cannot be written.
        """
        if settings.folder is None:
            raise ConfigError(
                "the simulated attester keeps its test authority in a private folder; name one "
                "with the key `folder`"
            )
        quoter = SyntheticQuoter.open(settings.folder)
        return quoter.evidence(measure_package(), report_data, utc_now())
