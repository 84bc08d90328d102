//! Files that have names for the code of a module: the module itself, or a debug file.
//!
//! Distributions strip programs and ship debug information in files of their own. Two conventions
//! lead there: `/usr/lib/debug/.build-id/ab/cdef.debug` for the build id `abcdef`, and the section
//! `.gnu_debuglink`, which holds a file name. Only a file with the module's own build id is used.
//!
//! Everything is opened here, before the process is confined ([`super::confine`]) and before a byte
//! of it is looked at; only where a user searches directories of theirs are ELF headers read, in
//! bounded pieces, to know which files to keep. Root gives up all but reading before that
//! ([`super::confine::only_read`]).
//!
//! Build id, path and link come from a process that may ask for a file that its user cannot read,
//! through us. So on behalf of a process only such debug files count that everybody may read, or
//! that lie beside the module and belong to its owner. And beside the module is only looked where
//! its path means the same file here as it did there: in a container it need not.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use memtrace_unwind::elf::ElfHeaders;
use memtrace_unwind::proc_dir::open_regular;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use super::frame_names::ModuleName;
use super::job::NamingJob;
use super::symbolizer::SourceFile;

/// Where distributions put debug information.
pub const SYSTEM_DIRS: [&str; 1] = ["/usr/lib/debug"];
/// Most files and directories visited in one search.
const MAX_VISITED: usize = 200_000;
/// Deepest directory that is searched.
const MAX_DEPTH: usize = 16;
/// Most debug files opened for one module; a search may find any number of copies.
const MAX_DEBUG_FILES: usize = 4;

/// What is to be named of one module, and the open files that may have the names.
pub struct ModuleFiles {
    /// Its path and build id.
    pub name: ModuleName,
    /// Offsets in its file, bytes.
    pub offsets: BTreeSet<u64>,
    /// The module itself.
    pub own: Option<SourceFile>,
    /// Files that are its debug files if they have its build id, the best first. Cap:
    /// `MAX_DEBUG_FILES`.
    pub debug: Vec<SourceFile>,
}

/// Opens all files that a job may need.
pub fn open_all(job: NamingJob) -> Vec<ModuleFiles> {
    let system = SYSTEM_DIRS.iter().map(PathBuf::from);
    let dirs: Vec<PathBuf> = job.debug_dirs.iter().cloned().chain(system).collect();
    let wanted = job.unnamed.0.iter().filter_map(|((_, build_id), _)| build_id.as_deref()).collect();
    let mut found = if job.search { search(&job.debug_dirs, &wanted) } else { BTreeMap::new() };
    let held: BTreeMap<ModuleName, PathBuf> = job.modules.into_iter().collect();
    let links: BTreeMap<ModuleName, String> = job.debug_links.into_iter().collect();
    let open = |(name, offsets): (ModuleName, BTreeSet<u64>)| {
        let own = held.get(&name).and_then(|path| File::open(path).ok());
        let (path, build_id) = &name;
        let mut debug = Vec::new();
        if let Some(id) = build_id {
            debug.extend(by_build_id(&dirs, id).iter().filter_map(|path| open_file(path, job.search)));
            if let (Some(link), Some(own)) = (links.get(&name), &own) {
                debug.extend(by_link(&dirs, path, link, own));
            }
            debug.extend(found.get_mut(id).map(std::mem::take).into_iter().flatten());
            if job.search {
                debug.extend(open_file(Path::new(path), true));
            }
        }
        let debug = debug.into_iter().take(MAX_DEBUG_FILES).filter_map(SourceFile::map).collect();
        ModuleFiles { name, offsets, own: own.and_then(SourceFile::map), debug }
    };
    job.unnamed.0.into_iter().map(open).collect()
}

/// Opens a regular file; unless the caller asks for themselves, only one that everybody may read.
fn open_file(path: &Path, for_caller: bool) -> Option<File> {
    let handle = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    open_regular(handle).filter(|file| for_caller || is_readable_to(file, None))
}

/// Whether everybody may read a file, or `owner` owns it.
fn is_readable_to(file: &File, owner: Option<u32>) -> bool {
    file.metadata().is_ok_and(|data| data.mode() & 0o004 != 0 || Some(data.uid()) == owner)
}

/// `DIR/.build-id/xx/yyy.debug` in `dirs`.
fn by_build_id(dirs: &[PathBuf], build_id: &str) -> Vec<PathBuf> {
    // The build id comes from an incident file: it may be anything, also a path.
    let sound = build_id.len() > 2 && build_id.bytes().all(|byte| byte.is_ascii_hexdigit());
    let Some((first, rest)) = build_id.split_at_checked(2).filter(|_| sound) else { return Vec::new() };
    dirs.iter().map(|dir| dir.join(format!(".build-id/{first}/{rest}.debug"))).collect()
}

/// The debug files that a module names (`.gnu_debuglink`), where gdb looks for them: beside the
/// module, in `.debug` there, and under the module's own path in directories for debug files.
fn by_link(dirs: &[PathBuf], path: &str, name: &str, own: &File) -> Vec<File> {
    let Some(dir) = Path::new(path).parent() else { return Vec::new() };
    let owner = own.metadata().ok().map(|data| data.uid());
    let beside = [dir.join(name), dir.join(".debug").join(name)];
    let beside = beside.iter().filter(|_| is_same_file(path, own)).filter_map(|path| open_without_links(path));
    let mut found: Vec<File> = beside.filter(|file| is_readable_to(file, owner)).collect();
    let below: PathBuf = dir.components().filter(|part| matches!(part, Component::Normal(_))).collect();
    found.extend(dirs.iter().filter_map(|root| open_file(&root.join(&below).join(name), false)));
    found
}

/// Whether a path leads to this open file here, where the module's path may be a container's.
fn is_same_file(path: &str, own: &File) -> bool {
    let identity = |file: &File| file.metadata().ok().map(|data| (data.dev(), data.ino()));
    open_without_links(Path::new(path)).is_some_and(|here| identity(&here).is_some_and(|id| Some(id) == identity(own)))
}

/// Opens a regular file if no part of its path is a symbolic link.
fn open_without_links(path: &Path) -> Option<File> {
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    open_regular(openat2(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve).ok()?)
}

/// Files in and below `dirs` that have one of the build ids, at most [`MAX_DEBUG_FILES`] each. Does
/// not follow symbolic links to directories.
fn search(dirs: &[PathBuf], build_ids: &BTreeSet<&str>) -> BTreeMap<String, Vec<File>> {
    let mut found: BTreeMap<String, Vec<File>> = BTreeMap::new();
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
                    let Some(file) = open_file(&path, true) else { continue };
                    let build_id = ElfHeaders::read(&file).ok().and_then(|headers| headers.build_id);
                    if let Some(id) = build_id.filter(|id| build_ids.contains(id.as_str())) {
                        let files = found.entry(id).or_default();
                        if files.len() < MAX_DEBUG_FILES {
                            files.push(file);
                        }
                    }
                }
                _ => {}
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    const LINK: &str = "program.debug";

    /// A directory with a module `bin/program` that names the debug file `program.debug`.
    struct Place {
        dir: tempfile::TempDir,
        program: PathBuf,
    }

    fn place() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        std::fs::create_dir_all(bin.join(".debug")).unwrap();
        let program = bin.canonicalize().unwrap().join("program");
        std::fs::write(&program, "program").unwrap();
        Place { dir, program }
    }

    fn write(path: &Path, mode: u32) {
        std::fs::write(path, path.to_str().unwrap()).unwrap();
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }

    impl Place {
        /// What the files that `by_link` opens contain, which is their path.
        fn linked(&self, dirs: &[PathBuf]) -> Vec<String> {
            let own = File::open(&self.program).unwrap();
            let found = by_link(dirs, self.program.to_str().unwrap(), LINK, &own);
            found.into_iter().map(|file| std::io::read_to_string(file).unwrap()).collect()
        }
    }

    #[test]
    fn debug_files_lie_where_gdb_looks_for_them() {
        let place = place();
        let bin = place.program.parent().unwrap();
        let root = place.dir.path().join("debug");
        let below = root.join(bin.strip_prefix("/").unwrap());
        std::fs::create_dir_all(&below).unwrap();
        let all = [bin.join("program.debug"), bin.join(".debug/program.debug"), below.join("program.debug")];
        for path in &all {
            write(path, 0o644);
        }
        assert_eq!(place.linked(&[root]), all.map(|path| path.to_str().unwrap().to_owned()));
    }

    #[test]
    fn a_link_does_not_lead_to_what_its_user_cannot_read() {
        let place = place();
        let bin = place.program.parent().unwrap();
        let secret = place.dir.path().join("secret");
        write(&secret, 0o644);
        // Not through links, whatever they lead to.
        symlink(&secret, bin.join("program.debug")).unwrap();
        std::fs::remove_dir(bin.join(".debug")).unwrap();
        symlink(place.dir.path(), bin.join(".debug")).unwrap();
        write(&place.dir.path().join("program.debug"), 0o644);
        assert!(place.linked(&[]).is_empty());
        // In a directory for debug files links are its owner's, but the file must be public.
        let below = place.dir.path().join("debug").join(bin.strip_prefix("/").unwrap());
        std::fs::create_dir_all(&below).unwrap();
        symlink(&secret, below.join("program.debug")).unwrap();
        assert_eq!(place.linked(&[place.dir.path().join("debug")]), [secret.to_str().unwrap()]);
        write(&secret, 0o640);
        assert!(place.linked(&[place.dir.path().join("debug")]).is_empty());
    }

    #[test]
    fn beside_the_module_means_beside_that_very_file() {
        let place = place();
        let bin = place.program.parent().unwrap().to_owned();
        write(&bin.join("program.debug"), 0o600);
        assert_eq!(place.linked(&[]).len(), 1, "it belongs to the module's owner");
        // Another root: the path is that of another file here.
        let own = File::open(&place.program).unwrap();
        std::fs::rename(&place.program, bin.join("moved")).unwrap();
        std::fs::write(&place.program, "another program").unwrap();
        assert!(by_link(&[], place.program.to_str().unwrap(), LINK, &own).is_empty());
    }

    #[test]
    fn only_regular_files_are_opened_and_private_ones_for_their_caller() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        rustix::fs::mknodat(CWD, &path, rustix::fs::FileType::Fifo, Mode::from_raw_mode(0o644), 0).unwrap();
        assert!(open_file(&path, true).is_none() && open_file(dir.path(), true).is_none());
        assert!(open_file(Path::new("/dev/null"), true).is_none());
        std::fs::remove_file(&path).unwrap();
        write(&path, 0o600);
        assert!(open_file(&path, true).is_some() && open_file(&path, false).is_none());
    }

    #[test]
    fn a_build_id_that_is_a_path_leads_nowhere() {
        let dirs = [PathBuf::from("/debug")];
        assert_eq!(by_build_id(&dirs, "abcdef"), [Path::new("/debug/.build-id/ab/cdef.debug")]);
        for bad in ["", "a", "ab", "../../etc", "ab/../../x", "\u{e4}\u{f6}\u{fc}"] {
            assert!(by_build_id(&dirs, bad).is_empty(), "{bad}");
        }
    }
}
