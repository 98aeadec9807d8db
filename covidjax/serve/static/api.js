// Requests to the server. The token, if the server wants one, stays in this tab.

const TOKEN = 'covidjax-token';

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
  }
}

export function setToken(token) {
  sessionStorage.setItem(TOKEN, token);
}

function authorise() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { Authorization: `Bearer ${token}` } : {};
}

export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: authorise() });
  } catch {
    throw new ApiError(0, { code: 'offline', message: 'The server does not answer. Is it still running?' });
  }
  if (!response.ok) throw readError(response.status, await response.text());
  return response;
}

export async function getJson(path, options) {
  return (await request(path, options)).json();
}

function readError(status, text) {
  try {
    return new ApiError(status, JSON.parse(text).error);
  } catch {
    return new ApiError(status, { code: 'http', message: `The server answered with status ${status}.` });
  }
}

// Uploads files under neutral names, since the names of files may be those of patients. fetch() tells no progress.
export function upload(files, { onProgress, signal }) {
  const form = new FormData();
  files.forEach((file, i) => form.append('files', file, `${String(i + 1).padStart(5, '0')}${findEnding(file.name)}`));
  return new Promise((resolve, reject) => {
    const xhr = new XMLHttpRequest();
    xhr.open('POST', '/api/scans');
    for (const [name, value] of Object.entries(authorise())) xhr.setRequestHeader(name, value);
    xhr.upload.onprogress = (event) => onProgress(event.total ? event.loaded / event.total : 0);
    xhr.onload = () => (xhr.status === 202 ? resolve(JSON.parse(xhr.responseText)) : reject(readError(xhr.status, xhr.responseText)));
    xhr.onerror = () => reject(new ApiError(0, { code: 'offline', message: 'The upload broke off. Is the server still running?' }));
    xhr.onabort = () => reject(new ApiError(0, { code: 'aborted', message: 'The upload was cancelled.' }));
    signal.addEventListener('abort', () => xhr.abort());
    xhr.send(form);
  });
}

function findEnding(name) {
  const found = name.toLowerCase().match(/(\.nii)?\.[a-z0-9]{1,5}$/);
  return found ? found[0] : '';
}
