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


def test_volume_errors_have_a_panel_for_each_unit_that_is_known(tmp_path):
    volumes = [
        {'outlined_ml': outlined, 'predicted_ml': predicted, 'outlined_percent': None, 'predicted_percent': None}
        for outlined, predicted in ((100, 110), (20, 10), (None, None))
    ]
    scores = {
        'volumes': volumes,
        'volume_error_ml': {'mean': 0, 'n': 2, 'limits': [-27.7, 27.7]},
        'volume_error_percent': {'mean': None, 'n': 0, 'limits': None},
    }
    [axes] = figures.render_volume_errors(scores).axes
    assert axes.collections[0].get_offsets().tolist() == [[105, 10], [15, -10]]
    assert [line.get_ydata()[0] for line in axes.get_lines()] == [0, -27.7, 27.7, 0]
    alone = scores | {'volumes': volumes[:1], 'volume_error_ml': {'mean': 10, 'n': 1, 'limits': None}}
    figures.save_figure(figures.render_volume_errors(alone), tmp_path / 'errors.png')
