//! Files that name the code of a module: the module itself, or one with its build id that was kept apart.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use object::{Object, ReadCache};

use super::elf::{Headers, Segment};
use super::modules::OpenModule;
use super::proc_dir::fd_path;

/// Where distributions put debug information.
pub const SYSTEM_DIRS: [&str; 1] = ["/usr/lib/debug"];
/// Files and directories that are looked at below the directories of a user.
const MAX_VISITED: usize = 200_000;
/// How deep.
const MAX_DEPTH: usize = 16;

/// A file that may name code.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Opens it.
    pub path: PathBuf,
    /// Headers of the module that frames are offsets in.
    pub headers: Arc<Headers>,
    /// Keeps `path` good, when that goes through a descriptor.
    _held: Option<Arc<File>>,
}

impl Candidate {
    /// The module itself.
    pub fn of_module(module: &OpenModule) -> Self {
        Self { path: fd_path(&*module.file), headers: module.headers.clone(), _held: Some(module.file.clone()) }
    }

    /// A file with the build id of a module; `headers` are the module's, when it is at hand.
    pub fn of_debug_file(path: PathBuf, build_id: &str, headers: Option<Arc<Headers>>) -> Option<Self> {
        let own = read_headers(&path).filter(|own| own.build_id.as_deref() == Some(build_id))?;
        let headers = headers.unwrap_or_else(|| Arc::new(with_layout(own)));
        Some(Self { path, headers, _held: None })
    }

    /// The address that stands for an offset in the module's file.
    pub fn stated_address(&self, offset: u64) -> Option<u64> {
        self.headers.stated_address(offset)
    }
}

/// `DIR/.build-id/xx/yyy.debug` of each directory and of those of the system.
pub fn by_build_id(dirs: &[PathBuf], build_id: &str) -> impl Iterator<Item = PathBuf> {
    let (first, rest) = build_id.split_at_checked(2).unwrap_or_default();
    let name = format!(".build-id/{first}/{rest}.debug");
    let system = SYSTEM_DIRS.iter().map(PathBuf::from);
    // What an incident file gives for a build id need not be one.
    let sound = build_id.len() > 2 && build_id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let paths: Vec<PathBuf> = dirs.iter().cloned().chain(system).map(|dir| dir.join(&name)).collect();
    paths.into_iter().filter(move |path| sound && path.is_file())
}

/// Where the debug file that a module names (`.gnu_debuglink`) is looked for: beside it, in `.debug` there, and below the
/// directories for debug files under the module's own path.
pub fn by_link(dirs: &[PathBuf], module: &OpenModule) -> Vec<PathBuf> {
    let cache = ReadCache::new(&*module.file);
    let named = object::File::parse(&cache).ok().and_then(|file| {
        let (name, _) = file.gnu_debuglink().ok()??;
        Some(PathBuf::from(OsStr::from_bytes(name)))
    });
    // A name, not a way out of these directories.
    let Some(name) = named.filter(|name| name.components().eq(name.file_name().map(Component::Normal))) else {
        return Vec::new();
    };
    let Some(dir) = Path::new(&*module.path).parent() else { return Vec::new() };
    let below = dir.strip_prefix("/").unwrap_or(dir);
    let system = SYSTEM_DIRS.iter().map(PathBuf::from);
    let further = dirs.iter().cloned().chain(system).map(|root| root.join(below));
    [dir.to_owned(), dir.join(".debug")].into_iter().chain(further).map(|dir| dir.join(&name)).collect()
}

/// All files below the directories that have one of the build ids. Symbolic links to directories are not followed.
pub fn search(dirs: &[PathBuf], build_ids: &BTreeSet<&str>) -> BTreeMap<String, Vec<PathBuf>> {
    let mut found: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    let mut waiting: VecDeque<(PathBuf, usize)> = dirs.iter().map(|dir| (dir.clone(), 0)).collect();
    let mut left = MAX_VISITED;
    while let Some((dir, depth)) = waiting.pop_front() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Some(fewer) = left.checked_sub(1) else { return found };
            left = fewer;
            let (path, kind) = (entry.path(), entry.file_type());
            match kind {
                Ok(kind) if kind.is_dir() && depth < MAX_DEPTH => waiting.push_back((path, depth.saturating_add(1))),
                Ok(kind) if kind.is_file() => {
                    let build_id = read_headers(&path).and_then(|headers| headers.build_id);
                    if let Some(id) = build_id.filter(|id| build_ids.contains(id.as_str())) {
                        found.entry(id).or_default().push(path);
                    }
                }
                _ => {}
            }
        }
    }
    found
}

fn read_headers(path: &Path) -> Option<Headers> {
    let regular = std::fs::metadata(path).is_ok_and(|data| data.is_file());
    regular.then(|| File::open(path).ok())?.and_then(|file| Headers::read(file).ok())
}

/// A debug file made by objcopy has lost where the segments were in the module's file; their addresses and sizes it has
/// kept. Linkers put each segment at the first offset behind the one before that agrees with its address modulo its
/// alignment, so that the offsets follow from those.
fn with_layout(headers: Headers) -> Headers {
    let emptied = |segment: &Segment| segment.executable && segment.file_bytes < segment.memory_bytes;
    if !headers.segments.iter().any(emptied) {
        return headers;
    }
    let mut end: u64 = 0;
    let segments = headers
        .segments
        .iter()
        .map(|segment| {
            let align = segment.align.max(1);
            let past = segment.address.wrapping_sub(end).checked_rem(align).unwrap_or(0);
            let offset = end.saturating_add(past);
            end = offset.saturating_add(segment.memory_bytes);
            Segment { offset, file_bytes: segment.memory_bytes, ..*segment }
        })
        .collect();
    Headers { segments, ..headers }
}
