//! Files that have names for the code of a module: the module itself, or a debug file.
//!
//! Distributions strip programs and ship debug information in files of their own. Two conventions
//! lead there: `/usr/lib/debug/.build-id/ab/cdef.debug` for the build id `abcdef`, and the section
//! `.gnu_debuglink`, which holds a file name. Only a file with the module's own build id is used.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use memtrace_unwind::elf::{ElfHeaders, ElfSegment};
use memtrace_unwind::modules::OpenModule;
use memtrace_unwind::proc_dir::fd_path;
use object::{Object, ReadCache};

/// Where distributions put debug information.
pub const SYSTEM_DIRS: [&str; 1] = ["/usr/lib/debug"];
/// Most files and directories visited in one search.
const MAX_VISITED: usize = 200_000;
/// Deepest directory that is searched.
const MAX_DEPTH: usize = 16;

/// A file that may have names for the code of a module.
#[derive(Clone, Debug)]
pub struct DebugCandidate {
    /// Path that opens it.
    pub path: PathBuf,
    /// Headers of the module; offsets of frames refer to its file.
    pub headers: Arc<ElfHeaders>,
    /// Keeps `path` valid if it goes through a descriptor.
    _held: Option<Arc<File>>,
}

impl DebugCandidate {
    /// The module itself.
    pub fn of_module(module: &OpenModule) -> Self {
        Self { path: fd_path(&*module.file), headers: module.headers.clone(), _held: Some(module.file.clone()) }
    }

    /// The file at `path`, if it has this build id. `headers` are the module's, if it can be read.
    /// Without them the layout of the module is computed from the debug file.
    pub fn of_debug_file(path: PathBuf, build_id: &str, headers: Option<Arc<ElfHeaders>>) -> Option<Self> {
        let own = read_headers(&path).filter(|own| own.build_id.as_deref() == Some(build_id))?;
        let headers = headers.unwrap_or_else(|| Arc::new(with_module_offsets(own)));
        Some(Self { path, headers, _held: None })
    }

    /// The stated address of an offset in the module's file.
    pub fn stated_address(&self, offset: u64) -> Option<u64> {
        self.headers.stated_address(offset)
    }
}

/// `DIR/.build-id/xx/yyy.debug` in `dirs` and the system's directories, where it is a file.
pub fn by_build_id(dirs: &[PathBuf], build_id: &str) -> impl Iterator<Item = PathBuf> {
    let (first, rest) = build_id.split_at_checked(2).unwrap_or_default();
    let name = format!(".build-id/{first}/{rest}.debug");
    let system = SYSTEM_DIRS.iter().map(PathBuf::from);
    // The build id comes from an incident file: it may be anything, also a path.
    let sound = build_id.len() > 2 && build_id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let paths: Vec<PathBuf> = dirs.iter().cloned().chain(system).map(|dir| dir.join(&name)).collect();
    paths.into_iter().filter(move |path| sound && path.is_file())
}

/// Paths where the debug file that a module names (`.gnu_debuglink`) may be, as gdb looks for it:
/// beside the module, in `.debug` there, and under the module's own path in directories for debug
/// files.
pub fn by_link(dirs: &[PathBuf], module: &OpenModule) -> Vec<PathBuf> {
    let cache = ReadCache::new(&*module.file);
    let named = object::File::parse(&cache).ok().and_then(|file| {
        let (name, _) = file.gnu_debuglink().ok()??;
        Some(PathBuf::from(OsStr::from_bytes(name)))
    });
    // It must be a file name: nothing that leads out of these directories.
    let Some(name) = named.filter(|name| name.components().eq(name.file_name().map(Component::Normal))) else {
        return Vec::new();
    };
    let Some(dir) = Path::new(&*module.path).parent() else { return Vec::new() };
    let below = dir.strip_prefix("/").unwrap_or(dir);
    let system = SYSTEM_DIRS.iter().map(PathBuf::from);
    let further = dirs.iter().cloned().chain(system).map(|root| root.join(below));
    [dir.to_owned(), dir.join(".debug")].into_iter().chain(further).map(|dir| dir.join(&name)).collect()
}

/// All files in and below `dirs` that have one of the build ids. Does not follow symbolic links to
/// directories.
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

fn read_headers(path: &Path) -> Option<ElfHeaders> {
    let regular = std::fs::metadata(path).is_ok_and(|data| data.is_file());
    regular.then(|| File::open(path).ok())?.and_then(|file| ElfHeaders::read(file).ok())
}

/// Restores the offsets that the segments have in the module's file. `objcopy --only-keep-debug`
/// keeps their addresses and sizes but not their offsets. Linkers put each segment at the first
/// offset after the one before that equals its address modulo its alignment, so the offsets follow.
fn with_module_offsets(headers: ElfHeaders) -> ElfHeaders {
    let emptied = |segment: &ElfSegment| segment.executable && segment.file_bytes < segment.memory_bytes;
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
            ElfSegment { offset, file_bytes: segment.memory_bytes, ..*segment }
        })
        .collect();
    ElfHeaders { segments, ..headers }
}
