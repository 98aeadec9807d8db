// The probabilities of the slices as a chart that leads to them.

const NS = 'http://www.w3.org/2000/svg';
const HEIGHT = 170;
const [LEFT, RIGHT, TOP, BOTTOM] = [42, 8, 8, 22];

export function createSvg(name, attributes, parent, text) {
  const element = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent?.append(element);
  return element;
}

// isShare: the values are small shares, and the axis ends at 1, 2 or 5 times a power of ten above them, in per cent.
export function createCurve(root, { count, classes, slices, rests, label, isShare, onChoose }) {
  let here = 1;
  const most = isShare ? findEnd(Math.max(...slices.map((one) => Math.max(...one.probabilities)))) : 1;
  const getX = (number, width) => LEFT + ((number - 1) / Math.max(1, count - 1)) * (width - LEFT - RIGHT);
  const getY = (share) => TOP + (1 - share / most) * (HEIGHT - TOP - BOTTOM);

  function draw() {
    const width = Math.max(200, root.clientWidth);
    const svg = createSvg('svg', { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, role: 'img', 'aria-label': label });
    for (const share of [0, most / 2, most]) {
      createSvg('line', { class: 'grid', x1: LEFT, x2: width - RIGHT, y1: getY(share), y2: getY(share) }, svg);
      createSvg('text', { x: LEFT - 6, y: getY(share) + 4, 'text-anchor': 'end' }, svg, isShare ? `${Number((100 * share).toPrecision(2))} %` : share.toFixed(1));
    }
    for (const [number, anchor] of count > 1 ? [[1, 'start'], [count, 'end']] : [[1, 'start']]) {
      createSvg('text', { x: getX(number, width), y: HEIGHT - 5, 'text-anchor': anchor }, svg, `${number}`);
    }
    for (const number of rests) {
      createSvg('line', { class: 'rests', x1: getX(number, width), x2: getX(number, width), y1: TOP, y2: HEIGHT - BOTTOM }, svg);
    }
    classes.forEach((_, k) => {
      const points = slices.map((one) => `${getX(one.number, width).toFixed(1)},${getY(one.probabilities[k]).toFixed(1)}`);
      createSvg('polyline', { class: `line class-${k}`, points: points.join(' ') }, svg);
      if (points.length === 1) {
        const [x, y] = points[0].split(',');
        createSvg('circle', { class: `bar class-${k}`, cx: x, cy: y, r: 4 }, svg);
      }
    });
    createSvg('line', { class: 'here', y1: TOP - 4, y2: HEIGHT - BOTTOM + 4 }, svg);
    svg.addEventListener('click', (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * width;
      onChoose(1 + ((x - LEFT) / (width - LEFT - RIGHT)) * (count - 1));
    });
    root.replaceChildren(svg);
    mark(here);
  }

  function mark(number) {
    here = number;
    const svg = root.firstElementChild;
    const line = svg?.querySelector('.here');
    if (!line) return;
    const x = getX(number, svg.viewBox.baseVal.width);
    line.setAttribute('x1', x);
    line.setAttribute('x2', x);
  }

  let drawn = 0;
  const watcher = new ResizeObserver(() => {
    if (root.clientWidth !== drawn) {
      drawn = root.clientWidth;
      draw();
    }
  });
  watcher.observe(root);
  return { mark, close: () => watcher.disconnect() };
}

function findEnd(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return Math.min(1, power * [1, 2, 5, 10].find((step) => step * power >= value));
}
