// The page: uploads, the list of scans of this tab, and the result of the chosen one.

import { ApiError, getJson, request, setToken, upload } from './api.js';
import { createCurve, createSvg } from './curve.js';
import { readDrop, readInput } from './files.js';
import { createViewer } from './viewer.js';

const LIST = 'covidjax-scans';
const POLL_MS = 700;
const STAGES = { reading: 'Reading the slices', predicting: 'Predicting', drawing: 'Drawing the result' };
const WORDS = { normal: 'Normal', pneumonia: 'Pneumonia', covid19: 'COVID-19', uncertain: 'Uncertain',
  lesions: 'Expected lesions, as a share of the largest lungs' };
// What prediction.json holds and the page shows elsewhere; anything else gets a table.
const SHOWN = new Set(['input', 'reading', 'left_out', 'forced', 'model', 'trained_on', 'notice', 'warnings', 'verdict', 'class',
  'probabilities', 'conformal', 'screening', 'vote', 'evidence', 'rests_on', 'slices_called', 'novelty', 'home', 'windows', 'slices',
  'seconds', 'lesions', 'sick', 'members']);
const DOWNLOADS = { 'prediction.html': 'Page', 'prediction.json': 'JSON', 'slices.csv': 'CSV of slices', 'dicom.zip': 'DICOM' };

const get = (id) => document.getElementById(id);
const create = (tag, text, className) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
};

let about = null;
let scans = JSON.parse(sessionStorage.getItem(LIST) ?? '[]');  // {key, id, name, status, progress, abort}
let chosen = null;
let rendered = '';  // what the result area shows
let open = [];  // viewer and curve, to close
let isPolling = false;

// ---------------------------------------------------------------------------------------------------------------------
// Start

async function start() {
  try {
    about = await getJson('/api/about');
  } catch (error) {
    if (error.status !== 401) {
      say(error.message);
      get('model').textContent = error.message;
      return;
    }
    get('token-form').hidden = false;
    get('token').focus();
    return;
  }
  get('token-form').hidden = true;
  get('columns').hidden = false;
  get('model').textContent = `${about.model}, trained on ${about.trained_on}. ${about.program}`;
  const warnings = [...(about.notice ? [`The model was trained on ${about.notice}`] : []), ...about.warnings];
  get('notice').hidden = !warnings.length;
  get('notice').textContent = `${warnings.join('. ')}.`;
  get('keep').textContent = `${format(about.keep_minutes)} minutes`;
  renderList();
  if (scans.length) choose(scans[0]);
  poll();
}

get('token-form').addEventListener('submit', async (event) => {
  event.preventDefault();
  setToken(get('token').value.trim());
  get('token-error').textContent = '';
  await start();
  if (!about) get('token-error').textContent = 'The server does not take this token.';
});

function save() {
  const kept = scans.filter((scan) => scan.id).map(({ id, name }) => ({ key: id, id, name }));
  sessionStorage.setItem(LIST, JSON.stringify(kept));
}

const say = (text) => { get('status').textContent = text; };
const format = (number) => Number(number).toLocaleString('en', { maximumSignificantDigits: 3 });

// ---------------------------------------------------------------------------------------------------------------------
// Upload

const drop = get('drop');
for (const name of ['dragenter', 'dragover']) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.add('over');
  });
}
for (const name of ['dragleave', 'drop']) document.addEventListener(name, () => drop.classList.remove('over'));
document.addEventListener('drop', async (event) => {
  event.preventDefault();
  if (about) add(await readDrop(event.dataTransfer));
});
for (const name of ['files', 'folder']) {
  get(`choose-${name}`).addEventListener('click', () => get(name).click());
  get(name).addEventListener('change', () => {
    add(readInput(get(name)));
    get(name).value = '';
  });
}

async function add({ name, files }) {
  if (!files.length) return;
  const abort = new AbortController();
  const scan = { key: crypto.randomUUID?.() ?? String(Math.random()), id: null, name, status: { state: 'uploading' }, progress: 0, abort };
  scans.unshift(scan);
  choose(scan);
  try {
    check(files);
    const status = await upload(files, {
      signal: abort.signal,
      onProgress(share) {
        scan.progress = share;
        renderList();
        renderResult();
      },
    });
    Object.assign(scan, { id: status.id, status });
    save();
    poll();
  } catch (error) {
    if (error.code === 'aborted') return;
    scan.status = { state: 'refused', error: { message: error.message, can_force: false } };
    say(`${name}: ${error.message}`);
  }
  renderList();
  renderResult();
}

// Says at once what the server would say after the upload.
function check(files) {
  const { num_files: most, upload_bytes: bytes } = about.limits;
  if (files.length > most) throw new ApiError(413, { message: `More than ${format(most)} files. Choose a single series, or a zip.` });
  if (files.reduce((sum, file) => sum + file.size, 0) > bytes) {
    throw new ApiError(413, { message: `More than ${format(bytes / 1e9)} GB. Choose a single series.` });
  }
}

async function remove(scan) {
  scan.abort?.abort();
  scans = scans.filter((other) => other !== scan);
  save();
  if (chosen === scan) choose(scans[0] ?? null);
  renderList();
  say(`${scan.name} was deleted.`);
  get('choose-files').focus();
  if (scan.id) await request(`/api/scans/${scan.id}`, { method: 'DELETE' }).catch(() => {});
}

async function predictAgain(scan, query) {
  try {
    scan.status = await getJson(`/api/scans/${scan.id}/predict?${new URLSearchParams(query)}`, { method: 'POST' });
  } catch (error) {
    say(error.message);
    scan.status = { ...scan.status, error: { ...scan.status.error, message: error.message } };
  }
  renderList();
  renderResult();
  get('result').focus();
  poll();
}

// ---------------------------------------------------------------------------------------------------------------------
// State

const isOpen = (scan) => scan.id && !['done', 'refused', 'gone'].includes(scan.status?.state);

async function poll() {
  if (isPolling) return;
  isPolling = true;
  while (scans.some(isOpen)) {
    for (const scan of scans.filter(isOpen)) await update(scan);
    renderList();
    renderResult();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
  isPolling = false;
}

async function update(scan) {
  try {
    scan.status = await getJson(`/api/scans/${scan.id}`);
    scan.read = Date.now();
  } catch (error) {
    if (error.status === 404) scan.status = { state: 'gone', error: { message: error.message, can_force: false } };
    else say(error.message);
    return;
  }
  if (scan.status.state === 'done') say(`${scan.name}: ${scan.status.view.headline}`);
  if (scan.status.state === 'refused') say(`${scan.name}: not predicted. ${scan.status.error.message}`);
}

function describeState(scan) {
  const { state, place, stage, error } = scan.status ?? {};
  if (state === 'uploading') return `Uploading, ${Math.round((scan.progress ?? 0) * 100)} %`;
  if (state === 'queued') return place === 1 ? 'Next in the queue' : `Number ${place} in the queue`;
  if (state === 'running') return STAGES[stage] ?? 'Starting';
  if (state === 'refused') return 'Not predicted';
  if (state === 'gone') return 'Deleted';
  if (state === 'done') return WORDS[scan.status.view?.verdict] ?? 'Predicted';
  return error?.message ?? 'Loading';
}

// ---------------------------------------------------------------------------------------------------------------------
// List

function choose(scan) {
  chosen = scan;
  renderList();
  renderResult();
}

function renderList() {
  const list = get('scans');
  get('no-scans').hidden = scans.length > 0;
  const known = new Map([...list.children].map((item) => [item.dataset.key, item]));
  scans.forEach((scan, i) => {
    let item = known.get(scan.key);
    known.delete(scan.key);
    if (!item) {
      item = create('li');
      item.dataset.key = scan.key;
      const button = create('button');
      button.type = 'button';
      button.append(create('span', scan.name, 'name'), create('span', '', 'soft'));
      button.addEventListener('click', () => {
        choose(scan);
        get('result').focus();
      });
      item.append(button);
    }
    const button = item.firstElementChild;
    button.toggleAttribute('aria-current', scan === chosen);
    const text = describeState(scan);
    if (button.lastElementChild.textContent !== text) button.lastElementChild.textContent = text;
    if (list.children[i] !== item) list.insertBefore(item, list.children[i] ?? null);
  });
  for (const item of known.values()) item.remove();
}

// ---------------------------------------------------------------------------------------------------------------------
// Result

function renderResult() {
  const state = chosen?.status?.state ?? (chosen ? 'loading' : 'none');
  const kind = { done: 'done', refused: 'refused', gone: 'refused' }[state] ?? 'waiting';
  const wanted = chosen ? `${kind} ${chosen.key} ${chosen.status?.error?.message ?? ''} ${chosen.status?.forced ?? ''}` : '';
  if (wanted !== rendered) {
    open.forEach((part) => part.close());
    open = [];
    rendered = wanted;
    const result = get('result');
    if (!chosen) {
      result.replaceChildren(create('p', 'Results appear here.', 'soft'));
      return;
    }
    result.replaceChildren(get(kind).content.cloneNode(true));
    result.querySelector('h2').textContent = chosen.name;
    const scan = chosen;
    for (const button of result.querySelectorAll('.delete')) button.addEventListener('click', () => remove(scan));
    if (kind === 'refused') renderRefusal(result, scan);
    if (kind === 'done') renderDone(result, scan);
  }
  if (kind === 'waiting' && chosen) {
    const progress = get('result').querySelector('progress');
    get('result').querySelector('.state').textContent = `${describeState(chosen)} ...`;
    if (state === 'uploading' && chosen.progress < 1) progress.value = chosen.progress;
    else progress.removeAttribute('value');
  }
}

function renderRefusal(result, scan) {
  const { message, code, can_force: canForce } = scan.status.error;
  result.querySelector('.reason').textContent = message;
  result.querySelector('.advice').textContent = canForce
    ? 'The input is doubtful. A forced prediction says so wherever it is shown.'
    : 'Nothing was predicted. Correct the input and drop it again.';
  renderDownloads(result.querySelector('.downloads'), scan, scan.status.files ?? []);
  const force = result.querySelector('.force');
  force.hidden = !canForce;
  force.addEventListener('click', () => predictAgain(scan, { force: 'true', ...(scan.series ? { series: scan.series } : {}) }));
  const form = result.querySelector('.series');
  form.hidden = !(code === 'input' && /series/.test(message) && scan.id);
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    scan.series = form.elements.series.value.trim();
    predictAgain(scan, { series: scan.series });
  });
}

async function renderDone(result, scan) {
  const { view, files } = scan.status;
  const mine = rendered;
  let summary;
  try {
    summary = await getJson(`/api/scans/${scan.id}/prediction.json`);
  } catch (error) {
    scan.status = { state: 'gone', error: { message: error.message, can_force: false } };
    renderList();
    renderResult();
    return;
  }
  if (mine !== rendered) return;
  const find = (name) => result.querySelector(name);
  find('.warnings').replaceChildren(...view.warnings.map((text) => create('p', text, 'banner')));
  find('.verdict').textContent = WORDS[summary.verdict] ?? summary.verdict ?? 'Lungs and lesions';
  find('.headline').textContent = view.headline.replace(/^Uncertain: (.)/, (_, first) => first.toUpperCase());  // as the verdict
  find('details').hidden = !view.reasons.length;
  find('.reasons').replaceChildren(...view.reasons.map((text) => create('li', text)));
  renderBars(find('.bars tbody'), summary.probabilities ?? {});
  renderDownloads(find('.downloads'), scan, files);
  renderFacts(find('.facts'), summary);
  renderLesions(find('.lesions'), summary.lesions);
  renderMore(find('.more'), summary);
  const minutes = Math.round((scan.status.deleted_in_seconds - (Date.now() - scan.read) / 1000) / 60);
  find('.keep').textContent = `This server deletes the scan in ${minutes} minutes.`;
  renderSlices(result, scan, summary, view.layers);
}

function renderBars(body, probabilities) {
  body.replaceChildren(...Object.entries(probabilities).map(([name, share], k) => {
    const row = create('tr');
    const head = create('th', WORDS[name] ?? name);
    head.scope = 'row';
    const cell = create('td');
    const svg = createSvg('svg', { 'aria-hidden': 'true', viewBox: '0 0 100 10', preserveAspectRatio: 'none' }, cell);
    createSvg('rect', { class: `bar class-${k}`, width: Math.max(0.4, share * 100), height: 10 }, svg);
    row.append(head, cell, create('td', `${(share * 100).toFixed(1)} %`));
    return row;
  }));
}

function renderSlices(result, scan, summary, layers) {
  // A lesion model alone gives scores of the slices in place of probabilities: expected lesions as a share of the largest lungs.
  const scores = (summary.lesions?.slices ?? []).map((one) => ({ ...one, probabilities: [one.score] }));
  const course = summary.slices ?? scores;
  const classes = summary.slices ? Object.keys(summary.probabilities) : ['lesions'];
  const slices = new Map(course.map((one) => [one.number, one]));
  const count = summary.input.num_slices;
  const top = [...scores].sort((a, b) => b.score - a.score).slice(0, 5).map((one) => one.number).sort((a, b) => a - b);
  const rests = summary.rests_on ?? top;
  if (!summary.rests_on) result.querySelector('.thumbs-title').textContent = 'Slices with the most lesions';
  const loadPicture = async (key) => (await request(`/api/scans/${scan.id}/${key}.png`)).blob();
  const describe = (number) => {
    const one = slices.get(number);
    const depth = one?.depth_mm == null ? '' : `, ${one.depth_mm.toFixed(0)} mm below the first`;
    return `Slice ${number} of ${count}${depth}: ${one ? describeShares(one, classes) : 'not seen by the model'}`;
  };
  const describeShares = (one, names) => (summary.slices
    ? names.map((name) => `${WORDS[name] ?? name} ${one.probabilities[classes.indexOf(name)].toFixed(2)}`).join(', ')
    : `lesions in ${format(one.lesions_percent)} % of the lungs`);
  const thumbs = new Map();
  const curve = createCurve(result.querySelector('.curve'), {
    count, classes, slices: course, rests, isShare: !summary.slices,
    label: `${classes.map((name) => WORDS[name] ?? name).join(', ')}, in each slice. The slider of the slices leads to the same slices.`,
    onChoose: (number) => viewer.show(number),
  });
  const viewer = createViewer(result.querySelector('.viewer'), {
    count, layers, loadPicture, describe,
    boxes: new Map(course.filter((one) => one.box).map((one) => [one.number, one.box])),
    onChange(number) {
      curve.mark(number);
      for (const [other, button] of thumbs) button.toggleAttribute('aria-current', other === number);
    },
  });
  open = [viewer, curve];
  result.querySelector('.map-note').textContent = layers.map
    ? `The map shows what the model weighed (${layers.map}), not a lesion. It is drawn where it is above its median, inside the crop.`
    : layers.has_lesions ? 'The lesion model outlined lungs (blue), lesions (red) and consolidation (yellow).'
      : 'No map of this run beat chance when its maps were scored, so none is shown.';
  result.querySelector('.legend').replaceChildren(...classes.map((name, k) => {
    const item = create('li');
    const svg = createSvg('svg', { viewBox: '0 0 40 10', 'aria-hidden': 'true' }, item);
    createSvg('line', { class: `line class-${k}`, x1: 0, x2: 40, y1: 5, y2: 5 }, svg);
    item.append(WORDS[name] ?? name);
    return item;
  }));
  result.querySelector('.thumbs').replaceChildren(...rests.map((number) => {
    const item = create('li');
    const button = create('button');
    const image = create('img');
    const one = slices.get(number);
    const top = one ? one.probabilities.indexOf(Math.max(...one.probabilities)) : 0;
    button.type = 'button';
    image.alt = '';
    button.append(image, create('span', `Slice ${number}`), create('span', one ? describeShares(one, [classes[top]]) : ''));
    button.addEventListener('click', () => viewer.show(number));
    loadPicture(`slices/${number}`).then((blob) => {
      image.src = URL.createObjectURL(blob);
      image.onload = () => URL.revokeObjectURL(image.src);
    }).catch(() => {});
    thumbs.set(number, button);
    item.append(button);
    return item;
  }));
  viewer.show(rests[Math.floor(rests.length / 2)] ?? Math.ceil(count / 2));
}

function renderDownloads(root, scan, files) {
  root.replaceChildren(...files.map((file) => {
    const button = create('button', DOWNLOADS[file] ?? file);
    button.type = 'button';
    button.addEventListener('click', async () => {
      try {
        const link = create('a');
        link.href = URL.createObjectURL(await (await request(`/api/scans/${scan.id}/${file}`)).blob());
        link.download = file;
        link.click();
        setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      } catch (error) {
        say(error.message);
      }
    });
    return button;
  }));
}

// Volumes of the lungs and their parts, and what is in them.
function renderLesions(root, lesions) {
  if (!lesions || lesions.lesions_percent === null) return;
  const columns = [['lungs_ml', 'Lungs, ml'], ['lesions_ml', 'Lesions, ml'], ['lesions_percent', 'Lesions, %'], ['consolidation_ml', 'Consolidation, ml']];
  const parts = [['Both lungs', lesions],
    ...Object.entries(lesions.sides).map(([name, amount]) => [`${name} lung`, amount]),
    ...Object.entries(lesions.thirds).map(([name, amount]) => [`${name} third`, amount])];
  const createRow = (cells, head) => {
    const row = create('tr');
    cells.forEach((text, i) => {
      const cell = create(head || i === 0 ? 'th' : 'td', text);
      if (cell.tagName === 'TH') cell.scope = head ? 'col' : 'row';
      row.append(cell);
    });
    return row;
  };
  const table = create('table', undefined, 'parts');
  table.append(createRow(['Part', ...columns.map(([, title]) => title)], true), ...parts.map(([name, amount]) => (
    createRow([name[0].toUpperCase() + name.slice(1), ...columns.map(([key]) => (amount[key] === null ? '' : format(amount[key])))], false))));
  const facts = create('dl', undefined, 'facts');
  const put = (name, value) => value !== null && facts.append(create('dt', name), create('dd', String(value)));
  put('mean of the lesions', lesions.lesions_hu === null ? null : `${format(lesions.lesions_hu)} HU`);
  put('lungs found', lesions.lungs_found);
  put('grade', lesions.grade === null ? null : `${lesions.grade} (${lesions.grade_says}), ${lesions.grade_rule}`);
  put('infected slices', `${lesions.num_infected}, with ${lesions.infected_rule}`);
  put('threshold', format(lesions.threshold));
  put('lesion model', `weights ${lesions.digest.slice(0, 12)}`);
  root.replaceChildren(create('h3', 'Lungs and lesions'), table, facts);
}

function renderFacts(root, summary) {
  const { input, reading } = summary;
  const facts = { kind: input.kind, slices: input.num_slices, sha256: input.sha256 };
  for (const [name, value] of Object.entries(reading)) if (name !== 'notes') facts[name] = value;
  facts.seconds = Object.entries(summary.seconds).map(([stage, seconds]) => `${stage} ${format(seconds)}`).join(', ');
  root.replaceChildren(...Object.entries(facts).flatMap(([name, value]) => [create('dt', name), create('dd', String(value))]));
}

// Measurements that this page has no place for: names and values.
function renderMore(root, summary) {
  const rest = Object.entries(summary).filter(([name, value]) => !SHOWN.has(name) && value !== null);
  if (!rest.length) return;
  const list = create('dl', undefined, 'facts');
  const put = (name, value) => {
    if (Array.isArray(value) && (!value.length || value.length > 12 || typeof value[0] === 'object')) return;
    if (value !== null && typeof value === 'object' && !Array.isArray(value)) {
      for (const [key, inner] of Object.entries(value)) put(`${name}, ${key.replaceAll('_', ' ')}`, inner);
    } else {
      list.append(create('dt', name), create('dd', typeof value === 'number' ? format(value) : String(value ?? 'none')));
    }
  };
  for (const [name, value] of rest) put(name.replaceAll('_', ' '), value);
  root.replaceChildren(create('h3', 'Measurements'), list);
}

start();
