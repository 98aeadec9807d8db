"""Codes of the terms in DICOM results: SNOMED CT, and RadLex beside it where it has the same term.

Needs highdicom, an optional package.
"""

from typing import NamedTuple

from pydicom.dataset import Dataset
from pydicom.sr.codedict import Code


class Term(NamedTuple):
    """A term.

    Attributes:
      value: SNOMED CT identifier, https://browser.ihtsdotools.org.
      meaning: name of the term.
      radlex: RadLex identifier and name of the same term, https://radlex.org; None without one.
    """

    value: str
    meaning: str
    radlex: tuple[str, str] | None = None


TERMS = {
    'normal': Term('17621005', 'Normal'),
    'pneumonia': Term('233604007', 'Pneumonia', ('RID5350', 'pneumonia')),
    'covid19': Term('840539006', 'COVID-19'),
    'uncertain': Term('64957009', 'Uncertain'),
    'undetermined': Term('373068000', 'Undetermined'),
    'lungs': Term('39607008', 'Lung', ('RID1301', 'lung')),
    'lesion': Term('52988006', 'Lesion'),
    'consolidation': Term('95436008', 'Lung consolidation', ('RID43255', 'consolidation')),
    'presence': Term('705057003', 'Presence'),
    'present': Term('52101004', 'Present'),
    'chest CT': Term('169069000', 'CT of chest'),
}
EVALUATIONS = Code('C0034375', 'UMLS', 'Qualitative Evaluations')
MILLILITRE = Code('ml', 'UCUM', 'milliliter')


def create_code(name: str) -> Dataset:
    """Returns a term of `TERMS` as an item of a code sequence. RadLex is its equivalent code (DICOM PS3.3, 8.8)."""
    from highdicom.sr import CodedConcept

    term = TERMS[name]
    code = CodedConcept(term.value, 'SCT', term.meaning)
    if term.radlex:
        identifier, name_there = term.radlex
        code.EquivalentCodeSequence = [CodedConcept(identifier, 'RADLEX', name_there)]
    return code
