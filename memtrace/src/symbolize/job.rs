//! What the process that names frames is asked to do, and what its caller lets it open for that.

use std::collections::BTreeSet;
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

/// A job of the process that names frames.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NamingJob {
    /// Cap: [`super::subprocess::MODULES_PER_CHILD`].
    pub modules: Vec<ModuleJob>,
    /// Directories with debug files, before those of the system.
    pub debug_dirs: Vec<PathBuf>,
    /// Whether the caller asks for themselves: any file in and below `debug_dirs`, and at the paths
    /// of modules, is looked at. Otherwise it is asked for a process, and a debug file must be one
    /// that everybody may read.
    pub search: bool,
}

/// What is to be named of one module.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModuleJob {
    /// Its path and build id.
    pub name: ModuleName,
    /// Offsets in its file, bytes.
    pub offsets: BTreeSet<u64>,
    /// The module itself, if it is held open.
    pub held: Option<HeldModule>,
}

/// A module that the caller holds open.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HeldModule {
    /// A path through which the caller's descriptor can be opened.
    pub opens_at: PathBuf,
    /// Name of its debug file, see [`memtrace_unwind::elf::ElfHeaders::debug_link`].
    pub debug_link: Option<String>,
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
        let module = |(name, offsets): &(ModuleName, BTreeSet<u64>)| ModuleJob {
            name: name.clone(),
            offsets: offsets.clone(),
            held: self.held(name),
        };
        NamingJob {
            modules: unnamed.0.iter().take(most).map(module).collect(),
            debug_dirs: self.debug_dirs.clone(),
            search: self.search,
        }
    }

    fn held(&self, (path, build_id): &ModuleName) -> Option<HeldModule> {
        let same = |open: &&OpenModule| *open.path == **path && open.build_id.as_deref() == build_id.as_deref();
        let mut open = self.modules.iter().filter(same);
        // Two files of one path and no build id: it may be either, so it is neither.
        let module = match (open.next()?, open.next()) {
            (_, Some(_)) if build_id.is_none() => return None,
            (first, _) => first,
        };
        let fd = fd_path(&*module.file);
        let opens_at = Path::new("/proc").join(std::process::id().to_string()).join("fd").join(fd.file_name()?);
        Some(HeldModule { opens_at, debug_link: module.headers.debug_link.clone() })
    }
}
