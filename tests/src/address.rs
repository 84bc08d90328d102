//! An address of this machine that is not a loopback address, wherever the tests run: it is put on
//! the loopback interface, which every machine has.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context, ensure};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// Message types of netlink (include/uapi/linux/rtnetlink.h).
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;

/// An address that is taken away again when this is dropped.
#[derive(Debug)]
pub struct OwnAddress(Ipv4Addr);

impl OwnAddress {
    /// Adds one that no other test process has. Needs root.
    pub fn add() -> anyhow::Result<Self> {
        static COUNT: AtomicU8 = AtomicU8::new(0);
        let [.., high, low] = std::process::id().to_be_bytes();
        let address = Ipv4Addr::new(10, 200 + COUNT.fetch_add(1, Ordering::Relaxed) % 50, high, low);
        change(RTM_NEWADDR, address).with_context(|| format!("failed to add the address {address}"))?;
        Ok(Self(address))
    }

    /// The address.
    pub fn ip(&self) -> Ipv4Addr {
        self.0
    }
}

impl Drop for OwnAddress {
    fn drop(&mut self) {
        // The interface keeps it then, which harms nobody.
        let _ = change(RTM_DELADDR, self.0);
    }
}

/// Does what `ip addr add ADDRESS/32 dev lo` and `ip addr del` do.
fn change(kind: u16, address: Ipv4Addr) -> anyhow::Result<()> {
    const LENGTH: u32 = 40;
    const AF_INET: u8 = 2;
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    // NLM_F_REQUEST, NLM_F_ACK; when adding NLM_F_CREATE and NLM_F_EXCL
    let flags: u16 = if kind == RTM_NEWADDR { 0x605 } else { 5 };
    let mut message = Vec::new();
    // nlmsghdr: length, type, flags, sequence, port
    message.extend(LENGTH.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    // ifaddrmsg: family, prefix, flags, scope, index of lo
    message.extend([AF_INET, 32, 0, 0]);
    message.extend(1u32.to_ne_bytes());
    for attribute in [IFA_LOCAL, IFA_ADDRESS] {
        message.extend(8u16.to_ne_bytes());
        message.extend(attribute.to_ne_bytes());
        message.extend(address.octets());
    }
    // protocol 0 of netlink is routes, links and addresses
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0u8; 256];
    let (_, length) = recv(&socket, &mut answer, RecvFlags::empty())?;
    // nlmsgerr: after the header of 16 bytes the error, 0 for none
    let error = answer.get(16..20).filter(|_| length >= 20).and_then(|error| error.try_into().ok());
    let error = i32::from_ne_bytes(error.context("the kernel gave no answer")?);
    ensure!(error == 0, "the kernel said {}", std::io::Error::from_raw_os_error(error.saturating_neg()));
    Ok(())
}
