// Shows the slices of a scan on a canvas: window, overlay, zoom; by key, wheel, slider, touch.

const MAX_CACHED = 60;  // slices; one of 512 x 512 takes 1 MB
const INFERNO = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
const LUNGS = [80, 190, 255];
const LABELS = [[0, 0, 0, 0], [...LUNGS, 0.25], [255, 90, 77, 0.7], [255, 210, 60, 0.8]];  // none, lungs, lesion, consolidation

// Windows on grey values. Those of Hounsfield units run from -1350 to 150, as in COVIDx.
const grey = (low, high) => [((low + 1350) / 1500) * 255, ((high + 1350) / 1500) * 255];
const WINDOWS = {
  hounsfield: [
    ['Lung, as the model saw it (-1350 to 150 HU)', [0, 255]],
    ['Narrow lung (-1100 to -100 HU)', grey(-1100, -100)],
    ['Ground glass (-950 to -350 HU)', grey(-950, -350)],
    ['Dense lung (-500 to 150 HU)', grey(-500, 150)],
    ['Soft tissue (-150 to 150 HU)', grey(-150, 150)],
  ],
  plain: [['As uploaded', [0, 255]], ['More contrast', [40, 215]], ['Dark parts', [0, 110]], ['Bright parts', [145, 255]]],
};

const getColour = (value) => {
  const place = value * (INFERNO.length - 1);
  const i = Math.min(Math.floor(place), INFERNO.length - 2);
  return INFERNO[i].map((c, k) => c + (INFERNO[i + 1][k] - c) * (place - i));
};
const RAMP = Array.from({ length: 256 }, (_, v) => getColour(v / 255));

export function createViewer(root, { count, layers, boxes, loadPicture, describe, onChange }) {
  const find = (name) => root.querySelector(name);
  const [stage, canvas, caption, slider] = ['.stage', 'canvas', '.caption', '.slider'].map(find);
  const [windowChoice, overlayChoice, opacity] = ['.window', '.overlay', '.opacity'].map(find);
  const state = { number: 1, zoom: 1, x: 0, y: 0 };  // x, y: of the centre, from the middle, in shares of the picture
  const cache = new Map();
  let shown = null;
  let isGone = false;

  const windows = layers.is_windowed ? WINDOWS.hounsfield : WINDOWS.plain;
  windows.forEach(([name], i) => windowChoice.add(new Option(name, String(i))));
  const overlays = [['', 'None']];
  if (layers.has_lungs) overlays.unshift(['lungs', 'Lungs']);
  if (layers.has_lesions) overlays.unshift(['lesions', 'Lesions']);
  if (layers.map) overlays.unshift(['maps', `Map: ${layers.map}`]);
  overlays.forEach(([value, name]) => overlayChoice.add(new Option(name, value)));
  slider.max = String(count);

  async function loadPixels(layer, number) {
    const key = `${layer}/${number}`;
    if (!cache.has(key)) {
      cache.set(key, loadPicture(key).then(readPixels, () => null));
      if (cache.size > 2 * MAX_CACHED) cache.delete(cache.keys().next().value);
    }
    return cache.get(key);
  }

  async function show(number) {
    state.number = Math.max(1, Math.min(count, Math.round(number)));
    const wanted = state.number;
    slider.value = String(wanted);
    const text = describe(wanted);
    slider.setAttribute('aria-valuetext', text);
    canvas.setAttribute('aria-label', text);
    caption.textContent = text;
    onChange(wanted);
    const layer = overlayChoice.value;
    const [slice, overlay] = await Promise.all([
      loadPixels('slices', wanted),
      layer && (layer !== 'maps' || boxes.has(wanted)) ? loadPixels(layer, wanted) : null,
    ]);
    if (wanted !== state.number || !slice || isGone) return;
    shown = { slice, overlay, layer, box: layer === 'maps' ? boxes.get(wanted) : null };
    draw();
    for (const next of [wanted + 1, wanted - 1, wanted + 2]) {
      if (next >= 1 && next <= count) {
        loadPixels('slices', next);
        if (layer && (layer !== 'maps' || boxes.has(next))) loadPixels(layer, next);
      }
    }
  }

  function draw() {
    if (!shown || isGone) return;
    const { width, height } = shown.slice;
    const side = Math.max(1, stage.clientWidth);
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(side * scale);
    canvas.height = Math.round(((side * height) / width) * scale);
    const context = canvas.getContext('2d');
    context.imageSmoothingQuality = 'high';
    const fit = (canvas.width / width) * state.zoom;
    context.setTransform(
      fit, 0, 0, fit,
      canvas.width / 2 - (0.5 + state.x) * width * fit, canvas.height / 2 - (0.5 + state.y) * height * fit,
    );
    const [low, high] = windows[Number(windowChoice.value)][1];
    context.drawImage(paint(shown.slice, (v) => {
      const g = Math.max(0, Math.min(255, ((v - low) / (high - low)) * 255));
      return [g, g, g, 255];
    }), 0, 0);
    if (!shown.overlay) return;
    const share = Number(opacity.value) / 100;
    const floor = findMedian(shown.overlay.values);
    const colours = {
      maps: (v) => {
        const height = Math.max(0, v - floor) / Math.max(1, 255 - floor);
        return [...RAMP[Math.round(255 * height)], 255 * share * height ** 0.7];
      },
      lungs: (v) => [...LUNGS, v * share * 0.6],
      lesions: (v) => {
        const [r, g, b, strength] = LABELS[Math.min(3, Math.round(v / 80))];
        return [r, g, b, 255 * share * strength];
      },
    };
    const colour = colours[shown.layer];
    const [x0, y0, x1, y1] = shown.box ?? [0, 0, width, height];
    context.drawImage(paint(shown.overlay, colour), x0, y0, x1 - x0, y1 - y0);
  }

  function zoom(factor) {
    state.zoom = Math.max(1, Math.min(12, state.zoom * factor));
    move(0, 0);
  }

  function move(dx, dy) {  // in shares of the visible part
    const reach = 0.5 - 0.5 / state.zoom;
    state.x = Math.max(-reach, Math.min(reach, state.x + dx / state.zoom));
    state.y = Math.max(-reach, Math.min(reach, state.y + dy / state.zoom));
    canvas.classList.toggle('zoomed', state.zoom > 1);
    draw();
  }

  const turn = (choice) => {
    choice.selectedIndex = (choice.selectedIndex + 1) % choice.options.length;
    choice.dispatchEvent(new Event('change'));
  };
  const STEPS = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
  const MOVES = { ArrowDown: [0, 0.1], ArrowUp: [0, -0.1], ArrowRight: [0.1, 0], ArrowLeft: [-0.1, 0] };
  stage.addEventListener('keydown', (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.shiftKey && event.key in MOVES) move(...MOVES[event.key]);
    else if (event.key in STEPS) show(state.number + STEPS[event.key]);
    else if (event.key === '+' || event.key === '=') zoom(1.3);
    else if (event.key === '-') zoom(1 / 1.3);
    else if (event.key === '0') zoom(0);
    else if (event.key === 'w') turn(windowChoice);
    else if (event.key === 'o') turn(overlayChoice);
    else return;
    event.preventDefault();
  });

  let turned = 0;
  stage.addEventListener('wheel', (event) => {
    event.preventDefault();
    if (event.ctrlKey) {
      zoom(Math.exp(-event.deltaY / 200));
      return;
    }
    turned += event.deltaMode ? event.deltaY * 30 : event.deltaY;
    const steps = Math.trunc(turned / 30);
    turned -= steps * 30;
    if (steps) show(state.number + steps);
  }, { passive: false });

  const pointers = new Map();
  let dragged = 0;
  canvas.addEventListener('pointerdown', (event) => {
    pointers.set(event.pointerId, event);
    canvas.setPointerCapture(event.pointerId);
    stage.focus({ preventScroll: true });
    dragged = 0;
  });
  canvas.addEventListener('pointermove', (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const side = canvas.clientWidth;
    const others = [...pointers.values()].filter((other) => other.pointerId !== event.pointerId);
    if (others.length) {
      const distance = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) || 1;
      zoom(distance(event, others[0]) / distance(before, others[0]));
    } else if (state.zoom > 1) {
      move((before.clientX - event.clientX) / side, (before.clientY - event.clientY) / canvas.clientHeight);
    } else {
      dragged += event.clientX - before.clientX;
      const step = Math.max(4, side / count);
      const steps = Math.trunc(dragged / step);
      dragged -= steps * step;
      if (steps) show(state.number + steps);
    }
    pointers.set(event.pointerId, event);
  });
  for (const name of ['pointerup', 'pointercancel']) {
    canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
  }

  slider.addEventListener('input', () => show(Number(slider.value)));
  overlayChoice.addEventListener('change', () => show(state.number));
  windowChoice.addEventListener('change', draw);
  opacity.addEventListener('input', draw);
  find('.in').addEventListener('click', () => zoom(1.3));
  find('.out').addEventListener('click', () => zoom(1 / 1.3));
  find('.fit').addEventListener('click', () => zoom(0));
  const watcher = new ResizeObserver(draw);
  watcher.observe(stage);
  return {
    show,
    close() {
      isGone = true;
      watcher.disconnect();
      cache.clear();
    },
  };
}

// Returns {width, height, values} of a grey picture.
async function readPixels(blob) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const values = new Uint8Array(width * height);
  for (let i = 0; i < values.length; i += 1) values[i] = data[4 * i];
  return { width, height, values };
}

function findMedian(values) {
  const counts = new Uint32Array(256);
  for (const value of values) counts[value] += 1;
  let rest = values.length / 2;
  return counts.findIndex((count) => (rest -= count) <= 0);
}

// Returns a canvas with the colour of each grey value.
function paint({ width, height, values }, getRgba) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext('2d');
  const image = context.createImageData(width, height);
  const table = Array.from({ length: 256 }, (_, v) => getRgba(v));
  for (let i = 0; i < values.length; i += 1) image.data.set(table[values[i]], 4 * i);
  context.putImageData(image, 0, 0);
  return canvas;
}
