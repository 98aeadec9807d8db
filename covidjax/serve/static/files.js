// The files that a person drops or chooses: [{name, file}] in natural order, and a name for the list.

export async function readDrop(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return describe([...transfer.files].map((file) => ({ path: file.name, file })), '');
  const found = [];
  for (const entry of entries) await walk(entry, '', found);
  return describe(found, entries.length === 1 ? entries[0].name : '');
}

export function readInput(input) {
  const found = [...input.files].map((file) => ({ path: file.webkitRelativePath || file.name, file }));
  return describe(found, found[0]?.path.includes('/') ? found[0].path.split('/')[0] : '');
}

async function walk(entry, parent, found) {
  if (entry.isFile) {
    found.push({ path: parent + entry.name, file: await new Promise((resolve, reject) => entry.file(resolve, reject)) });
    return;
  }
  const reader = entry.createReader();
  for (;;) {  // it gives at most 100 at a time
    const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!batch.length) return;
    for (const child of batch) await walk(child, `${parent}${entry.name}/`, found);
  }
}

function describe(found, folder) {
  found.sort((a, b) => a.path.localeCompare(b.path, 'en', { numeric: true }));
  const name = folder || (found.length === 1 ? found[0].path : `${found.length} files`);
  return { name, files: found.map(({ file }) => file) };
}
