//! The kernels of the matrix, and how each becomes a bootable image with the modules a machine
//! needs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use memtrace_harness::checkout::administrators;
use memtrace_harness::run::{output, say};

/// Which version of cgroups a machine has its memory controller on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub(crate) enum CgroupVersion {
    /// A hierarchy a controller
    V1,
    /// The unified hierarchy
    V2,
}

impl std::fmt::Display for CgroupVersion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// A kernel of the matrix.
pub(crate) struct Kernel {
    /// Name on the command line.
    pub(crate) name: &'static str,
    /// Debian suites; the newest version among them is taken.
    pub(crate) suites: &'static [&'static str],
    /// Versions of cgroups it is booted with.
    pub(crate) cgroups: &'static [CgroupVersion],
}

/// From old to new. Debian's kernels from 6.12 on have no memory controller on cgroup v1.
pub(crate) const KERNELS: [Kernel; 6] = [
    // before the backport of 2025 that changed the argument of mark_victim from a pid to a task
    Kernel { name: "5.10-old", suites: &["bullseye"], cgroups: &[CgroupVersion::V1] },
    Kernel {
        name: "5.10",
        suites: &["bullseye-security", "bullseye"],
        cgroups: &[CgroupVersion::V1, CgroupVersion::V2],
    },
    Kernel {
        name: "6.1",
        suites: &["bookworm-security", "bookworm"],
        cgroups: &[CgroupVersion::V1, CgroupVersion::V2],
    },
    Kernel { name: "6.12", suites: &["trixie-security", "trixie"], cgroups: &[CgroupVersion::V2] },
    Kernel { name: "sid", suites: &["sid"], cgroups: &[CgroupVersion::V2] },
    Kernel { name: "backports", suites: &["trixie-backports"], cgroups: &[CgroupVersion::V2] },
];

/// Names of the kernels of the matrix, from old to new.
pub fn names() -> [&'static str; 6] {
    KERNELS.map(|kernel| kernel.name)
}

/// Debian metapackage that depends on the current kernel image.
const METAPACKAGE: &str = "linux-image-amd64";

/// Modules a machine needs if they are not built in: virtio disks, ext4, 9p. A name that a kernel
/// does not have as a module is skipped.
const MODULES: [&str; 6] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "9pnet_virtio", "9p"];

/// Version of the cache layout, part of each stamp. Change it with the layout: older caches are
/// then ignored.
const FORM: &str = "1";

/// A kernel that is ready to boot.
#[derive(Clone, Debug)]
pub(crate) struct BootableKernel {
    /// Version of the Debian package.
    pub(crate) version: String,
    /// Release, as `uname -r` prints it.
    pub(crate) release: String,
    /// Path of the image.
    pub(crate) image: PathBuf,
    /// Paths of the modules, in load order.
    pub(crate) modules: Vec<PathBuf>,
}

/// Gets the kernel's newest version, from the cache if it has that version. Falls back to any
/// cached version if apt cannot be asked.
pub(crate) fn fetch(kernel: &Kernel, apt: &Result<Apt>, kernels: &Path) -> Result<BootableKernel> {
    let dir = kernels.join(kernel.name);
    let newest = match apt {
        Ok(apt) => apt.newest(METAPACKAGE, kernel.suites).map(|candidate| (apt, candidate)),
        Err(error) => Err(anyhow::anyhow!("{error:#}")),
    };
    let (apt, candidate) = match newest {
        Ok(newest) => newest,
        Err(error) => match cached(&dir)? {
            Some(ready) => {
                say(format_args!("{}: using {}, fetched earlier: {error:#}", kernel.name, ready.version));
                return Ok(ready);
            }
            None => return Err(error),
        },
    };
    if let Some(ready) = cached(&dir)?.filter(|ready| ready.version == candidate.version) {
        return Ok(ready);
    }
    say(format_args!("{}: fetching {} from {}", kernel.name, candidate.version, candidate.suite));
    let version = candidate.version.as_str();
    let image = apt.parts(METAPACKAGE, version)?.into_iter().find(|part| part.starts_with("linux-image-"));
    let image = image.with_context(|| format!("{METAPACKAGE} {version} names no image"))?;
    // since 6.19, image and modules are separate packages
    let mut packages = vec![image.clone()];
    let parts = ["linux-binary-", "linux-modules-"];
    packages.extend(apt.parts(&image, version)?.into_iter().filter(|p| parts.iter().any(|part| p.starts_with(part))));
    let files = apt.download(&packages, version)?;

    let unpacked = kernels.join(format!("{}.unpacked", kernel.name));
    remove(&unpacked)?;
    std::fs::create_dir_all(&unpacked).with_context(|| format!("failed to create {}", unpacked.display()))?;
    for file in &files {
        output(Command::new("dpkg-deb").arg("-x").arg(file).arg(&unpacked))?;
    }
    let ready = keep(&unpacked, &dir, version)?;
    remove(&unpacked)?;
    if let Some(debs) = files.first().and_then(|file| file.parent()) {
        remove(debs)?;
    }
    Ok(ready)
}

/// The kernel in the cache, if there is one in the current layout.
fn cached(dir: &Path) -> Result<Option<BootableKernel>> {
    let Ok(stamp) = std::fs::read_to_string(dir.join("version")) else { return Ok(None) };
    let mut words = stamp.split_ascii_whitespace();
    let (Some(FORM), Some(version), Some(release)) = (words.next(), words.next(), words.next()) else {
        return Ok(None);
    };
    let modules = dir.join("modules");
    let mut modules: Vec<PathBuf> = std::fs::read_dir(&modules)
        .with_context(|| format!("failed to read {}", modules.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    modules.sort();
    let (version, release) = (version.to_owned(), release.to_owned());
    Ok(Some(BootableKernel { version, release, image: dir.join("vmlinuz"), modules }))
}

/// Copies the image and the needed modules out of the unpacked packages. Writes the stamp last, so
/// that an interrupted copy is not used.
fn keep(unpacked: &Path, dir: &Path, version: &str) -> Result<BootableKernel> {
    let (base, release) = release(unpacked)?;
    let tree = base.join("lib/modules").join(&release);
    let places = [unpacked.join("boot").join(format!("vmlinuz-{release}")), tree.join("vmlinuz")];
    let image = places.iter().find(|place| place.is_file());
    let image = image.with_context(|| format!("there is no kernel image in the packages of {version}"))?;

    remove(dir)?;
    let modules = dir.join("modules");
    std::fs::create_dir_all(&modules).with_context(|| format!("failed to create {}", modules.display()))?;
    std::fs::copy(image, dir.join("vmlinuz")).with_context(|| format!("failed to copy {}", image.display()))?;
    output(administrators("depmod").arg("-b").arg(&base).arg(&release))?;
    let read = |name: &str| {
        let path = tree.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))
    };
    for (number, module) in closure(&read("modules.dep")?, &MODULES).iter().enumerate() {
        let bytes = decompressed(&tree.join(module))?;
        let path = modules.join(format!("{number:02}-{}.ko", name_of(module)));
        std::fs::write(&path, bytes).with_context(|| format!("failed to write {}", path.display()))?;
    }
    let stamp = dir.join("version");
    let text = format!("{FORM} {version} {release}\n");
    std::fs::write(&stamp, text).with_context(|| format!("failed to write {}", stamp.display()))?;
    cached(dir)?.context("what was just made ready is not there")
}

/// The directory that contains lib/modules, and the kernel's release.
fn release(unpacked: &Path) -> Result<(PathBuf, String)> {
    for base in [unpacked.to_path_buf(), unpacked.join("usr")] {
        if let Some(Ok(entry)) = std::fs::read_dir(base.join("lib/modules")).ok().and_then(|mut entries| entries.next())
        {
            return Ok((base, entry.file_name().to_string_lossy().into_owned()));
        }
    }
    bail!("there are no modules in {}", unpacked.display())
}

/// The wanted modules and their dependencies in load order, as paths of modules.dep.
fn closure(dependencies: &str, wanted: &[&str]) -> Vec<String> {
    let needs: BTreeMap<&str, Vec<&str>> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module, needs.split_ascii_whitespace().collect()))
        .collect();
    fn visit<'a>(module: &'a str, needs: &BTreeMap<&str, Vec<&'a str>>, order: &mut Order<'a>) {
        if !order.seen.insert(module) {
            return;
        }
        for need in needs.get(module).into_iter().flatten() {
            visit(need, needs, order);
        }
        order.modules.push(module.to_owned());
    }
    let mut order = Order::default();
    for name in wanted {
        if let Some(module) = needs.keys().find(|module| name_of(module) == *name) {
            visit(module, &needs, &mut order);
        }
    }
    order.modules
}

#[derive(Default)]
struct Order<'a> {
    seen: BTreeSet<&'a str>,
    modules: Vec<String>,
}

/// Module name of a path: `9p` of `kernel/fs/9p/9p.ko.xz`.
fn name_of(module: &str) -> String {
    let file = module.rsplit('/').next().unwrap_or(module);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn decompressed(module: &Path) -> Result<Vec<u8>> {
    let program = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return std::fs::read(module).with_context(|| format!("failed to read {}", module.display())),
    };
    let output = Command::new(program).arg("-dc").arg(module).output();
    let output = output.with_context(|| format!("failed to start {program}"))?;
    if !output.status.success() {
        bail!("{program} -dc {} ended with {}", module.display(), output.status);
    }
    Ok(output.stdout)
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dependencies = "kernel/a/virtio_pci.ko.xz: kernel/a/virtio.ko.xz kernel/a/virtio_ring.ko.xz\n\
            kernel/a/virtio.ko.xz:\nkernel/a/virtio_ring.ko.xz: kernel/a/virtio.ko.xz\nkernel/b/other-one.ko:\n";
        let order = closure(dependencies, &["virtio_pci", "other_one", "virtio", "built_in"]);
        assert_eq!(
            order.iter().map(|m| name_of(m)).collect::<Vec<_>>(),
            ["virtio", "virtio_ring", "virtio_pci", "other_one"]
        );
    }

    #[test]
    fn a_circle_of_modules_ends() {
        assert_eq!(closure("a.ko: b.ko\nb.ko: a.ko\n", &["a"]), ["b.ko", "a.ko"]);
    }
}
