import numpy as np

from covidjax.report.mistakes import build_mistakes, find_confident_mistakes


def test_mistakes_are_the_surest_and_at_most_two_of_a_patient():
    confidence = np.array([0.95, 0.9, 0.85, 0.8, 0.75, 0.99])
    p = np.stack([confidence, 1 - confidence], 1)
    labels = np.array([1, 1, 1, 1, 1, 0])  # the last is correct
    patients = ['a', 'a', 'a', 'b', 'c', 'd']
    assert find_confident_mistakes(p, labels, 3, patients) == [0, 1, 3]
    assert find_confident_mistakes(p, labels, 9, patients) == [0, 1, 3, 4]
    assert find_confident_mistakes(p, p.argmax(1), 3, patients) == []


def test_section_names_what_was_called_what():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.0, 0.1, 0.9]])
    shown = []

    def load_image(i):
        shown.append(i)
        return np.zeros((8, 8), np.uint8)

    def build(labels):
        names = ['1.png', '2.png', '3.png']
        return build_mistakes(
            p, np.array(labels), ['a', 'b', 'c'], names, load_image, what='slice', column='file', note=''
        )

    *_, table = build([1, 2, 0]).parts
    assert table.columns[0] == 'file'
    assert table.rows == [('3.png', 'normal', 'covid19', 0.9), ('1.png', 'pneumonia', 'normal', 0.7)]
    assert shown == [2, 0]
    assert build([0, 2, 2]).parts == ['No test slice is classified wrongly.']
