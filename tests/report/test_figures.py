from PIL import Image

from covidjax.report import figures

HISTORY = [
    {'epoch': e, 'train_loss': 1 / e, 'val_loss': 1.1 / e, 'train_accuracy': 0.5, 'val_accuracy': 0.4}
    for e in (1, 2, 3)
]


def test_curves_show_every_epoch_and_the_best(tmp_path):
    figure = figures.render_training_curves(HISTORY, 2)
    loss, accuracy = figure.axes
    train, val, best = loss.get_lines()
    assert train.get_ydata().tolist() == [1, 1 / 2, 1 / 3]
    assert val.get_ydata().tolist() == [1.1, 1.1 / 2, 1.1 / 3]
    assert list(best.get_xdata()) == [2, 2]
    assert accuracy.get_ylabel() == 'Accuracy'
    figures.save_figure(figure, tmp_path / 'curves.png')
    with Image.open(tmp_path / 'curves.png') as image:
        image.verify()
    assert [path.name for path in tmp_path.iterdir()] == ['curves.png']


def test_confusion_matrix_prints_counts_and_rates():
    figure = figures.render_confusion_matrix([[1200, 0], [30, 10]], ('a', 'b'), title='T')
    assert [text.get_text() for text in figure.axes[0].texts] == ['1,200\n100.0%', '0\n0.0%', '30\n75.0%', '10\n25.0%']


def test_confusion_matrix_of_a_class_without_cases():
    figure = figures.render_confusion_matrix([[0, 0], [1, 3]], ('a', 'b'), title='T')
    assert figure.axes[0].texts[0].get_text() == '0\n0.0%'
