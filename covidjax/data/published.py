"""Published slice counts of COVIDx CT and the paper's results on it.

CT-2A was published three times under the same name: the training list grew, the validation and test lists did not
change. The B variants add training cases whose diagnosis could not be verified.

Source: the history of the data tables in the COVIDNet-CT repository. CT-2A agrees with Table I of the paper. The totals
of CT-1 agree with published quotes.
"""

_VAL_2, _TEST_2 = (11842, 7400, 6244), (12245, 7395, 6018)
_VAL_3, _TEST_3 = (17570, 8008, 8147), (17922, 7965, 7894)

# Slices per class (normal, pneumonia, COVID-19) in train, val and test.
SLICES = {
    'CT-1': ((27201, 22061, 12520), (9107, 7400, 4529), (9450, 7395, 4346)),
    'CT-2A': ((35996, 25496, 82286), _VAL_2, _TEST_2),
    'CT-2A first draft': ((35446, 22044, 17557), _VAL_2, _TEST_2),
    'CT-2A second draft': ((35996, 25496, 36374), _VAL_2, _TEST_2),
    'CT-2B': ((35996, 25496, 88467), _VAL_2, _TEST_2),
    'CT-2B first draft': ((35996, 23326, 23454), _VAL_2, _TEST_2),
    'CT-2B second draft': ((35996, 25496, 42555), _VAL_2, _TEST_2),
    'CT-3A': ((35996, 26970, 294552), _VAL_3, _TEST_3),
    'CT-3B': ((35996, 26970, 300733), _VAL_3, _TEST_3),
}

# Sequences of 16 slices made from CT-2A, per class in train, val and test. Source: the paper's Table II.
SEQUENCES = ((486, 403, 1501), (172, 112, 146), (174, 100, 134))

# (precision, recall, F1) of normal, pneumonia, COVID-19 and their support-weighted average on the CT-2A test list.
# Source: the paper's Table III (ResNet50-ATT2, slices) and Table IV (ResNet50-LSTM-ATT2, 408 sequences).
SLICE_SCORES = ((0.992, 0.992, 0.986), (0.967, 0.963, 0.965), (0.936, 0.960, 0.947), (0.971, 0.971, 0.971))
SCAN_SCORES = ((1.000, 0.983, 0.991), (1.000, 0.980, 0.990), (0.964, 1.000, 0.982), (0.988, 0.988, 0.988))
