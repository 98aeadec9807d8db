import pytest

from covidjax.predict.dicom_codes import TERMS, create_code

pytest.importorskip('highdicom', reason='DICOM results need covidjax[dicom]')

# Verhoeff's check digit, which ends every SNOMED CT identifier: the dihedral group D5, and a permutation of digits.
_PRODUCT = [[(a + (b if a < 5 else -b)) % 5 + (5 if (a < 5) != (b < 5) else 0) for b in range(10)] for a in range(10)]
_PERMUTE = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]


def is_valid(identifier):
    found = 0
    for place, digit in enumerate(map(int, reversed(identifier))):
        for _ in range(place % 8):
            digit = _PERMUTE[digit]
        found = _PRODUCT[found][digit]
    return found == 0


def test_check_digits():
    assert is_valid('39607008')
    assert not is_valid('39607009')
    assert not is_valid('39670008')
    for term in TERMS.values():
        assert is_valid(term.value), term


def test_radlex_is_the_equivalent_code():
    code = create_code('lungs')
    assert (code.value, code.scheme_designator, code.meaning) == ('39607008', 'SCT', 'Lung')
    [other] = code.EquivalentCodeSequence
    assert (other.CodeValue, other.CodingSchemeDesignator, other.CodeMeaning) == ('RID1301', 'RADLEX', 'lung')
    assert 'EquivalentCodeSequence' not in create_code('normal')
