//! What the process that names frames is asked to do, and what its caller lets it open for that.

use std::path::{Path, PathBuf};

use memtrace_unwind::modules::OpenModule;
use memtrace_unwind::proc_dir::fd_path;
use serde::{Deserialize, Serialize};

use super::frame_names::{ModuleName, UnnamedFrames};

/// Where names may come from: modules that are held open, and debug files.
#[derive(Clone, Debug, Default)]
pub struct NameSources {
    /// Cap: that of the cache they come from, [`memtrace_unwind::modules::MAX_OPEN`].
    modules: Vec<OpenModule>,
    debug_dirs: Vec<PathBuf>,
    search: bool,
}

/// A job of the process that names frames; it comes as JSON.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NamingJob {
    /// What is to be named. Cap: [`super::subprocess::MODULES_PER_CHILD`] modules.
    pub unnamed: UnnamedFrames,
    /// The modules that the caller holds open, each with a path through which its descriptor can be
    /// opened. Cap: that of `unnamed`.
    pub modules: Vec<(ModuleName, PathBuf)>,
    /// Names of their debug files, see [`memtrace_unwind::elf::ElfHeaders::debug_link`]. Cap: that
    /// of `unnamed`.
    #[serde(default)]
    pub debug_links: Vec<(ModuleName, String)>,
    /// Directories with debug files, before those of the system.
    pub debug_dirs: Vec<PathBuf>,
    /// Whether the caller asks for themselves: any file in and below `debug_dirs`, and at the paths
    /// of modules, is looked at. Otherwise it is asked for a process, and a debug file must be one
    /// that everybody may read.
    pub search: bool,
}

impl NameSources {
    /// Names from the modules that the agent holds open, and from debug files that are installed on
    /// this machine. `debug_dirs` are searched first.
    pub fn with_modules(modules: Vec<OpenModule>, debug_dirs: &[PathBuf]) -> Self {
        Self { modules, debug_dirs: debug_dirs.to_vec(), search: false }
    }

    /// Names from files found by their build id only: in and below `debug_dirs`, and at the paths
    /// of the modules.
    pub fn with_files(debug_dirs: &[PathBuf]) -> Self {
        Self { modules: Vec::new(), debug_dirs: debug_dirs.to_vec(), search: true }
    }

    /// The job for the first `most` modules of `unnamed`.
    pub fn job(&self, unnamed: &UnnamedFrames, most: usize) -> NamingJob {
        let unnamed = UnnamedFrames(unnamed.0.iter().take(most).cloned().collect());
        let mut job = NamingJob { debug_dirs: self.debug_dirs.clone(), search: self.search, ..NamingJob::default() };
        for (name, _) in &unnamed.0 {
            let Some(module) = self.held(name) else { continue };
            job.modules.extend(descriptor_path(module).map(|path| (name.clone(), path)));
            job.debug_links.extend(module.debug_link.clone().map(|link| (name.clone(), link)));
        }
        NamingJob { unnamed, ..job }
    }

    fn held(&self, (path, build_id): &ModuleName) -> Option<&OpenModule> {
        let same = |open: &&OpenModule| *open.path == **path && open.build_id.as_deref() == build_id.as_deref();
        let mut open = self.modules.iter().filter(same);
        // Two files of one path and no build id: it may be either, so it is neither.
        match (open.next()?, open.next()) {
            (_, Some(_)) if build_id.is_none() => None,
            (first, _) => Some(first),
        }
    }
}

/// A path through which another process can open what this one holds open.
fn descriptor_path(module: &OpenModule) -> Option<PathBuf> {
    let fd = fd_path(&*module.file);
    // By this thread: the child may look into it because it has the same capabilities, which another
    // thread of the process can exceed (security/commoncap.c, `cap_ptrace_access_check`).
    let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
    let process = std::process::id().to_string();
    Some(Path::new("/proc").join(process).join("task").join(thread).join("fd").join(fd.file_name()?))
}
