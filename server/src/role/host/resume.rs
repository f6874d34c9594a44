//! Going on with what an earlier process of the server has left.

use std::fs::File;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use stiefel_shared::bundle::{ControlKey, Transport};
use stiefel_shared::session::SessionName;
use stiefel_sys::block::Disk;

use super::seat::{Holder, Session};
use super::{Host, Inner, is_device, size};
use crate::nbd::Export;
use crate::role::disk::{At, Base, Served, With};
use crate::role::link::Up;
use crate::role::record::Record;

impl Host {
    /// Goes on with sessions that an earlier process has left; their names and secrets.
    ///
    /// # Errors
    /// They cannot go on: the disk was not kept, or is another now.
    pub(in crate::role) fn resume(&self) -> anyhow::Result<Vec<(SessionName, ControlKey)>> {
        self.0.resume()
    }
}

impl Inner {
    fn resume(self: &Arc<Self>) -> anyhow::Result<Vec<(SessionName, ControlKey)>> {
        let records = self.setup.records.read()?;
        if records.is_empty() {
            return Ok(Vec::new());
        }
        let device = self.setup.records.disk()?;
        let disk = self.setup.machine.disk()?;
        ensure!(
            size(&device)? == self.handover.disk.size && is_device(&device, disk.device)?,
            "the disk that was kept is not the one that is there now"
        );
        let gone_on = if self.has_guests() {
            self.resume_guests(records, device, &disk)?
        } else {
            let record = records.into_iter().next().context("there is no session")?;
            vec![self.resume_one(record, &disk, |record, with| {
                if let Transport::NvmeTcp { nqn, .. } = &record.transport {
                    ensure!(self.setup.machine.published(nqn), "the disk is not served any more");
                }
                Served::adopt(with, device, &record.transport, &record.link)
            })?]
        };
        if !gone_on.is_empty() {
            self.setup
                .console
                .warn("the server was started anew; the session goes on");
        }
        Ok(gone_on)
    }

    /// One whose writes were not kept must not go on as if they had been; the others can.
    fn resume_guests(
        self: &Arc<Self>,
        records: Vec<Record>,
        device: File,
        disk: &Disk,
    ) -> anyhow::Result<Vec<(SessionName, ControlKey)>> {
        let base = Base::new(device, disk)?;
        let mut gone_on = Vec::new();
        for record in records {
            let (name, place, key) = (record.session.parse()?, record.place, record.key.clone());
            match self.resume_one(record, disk, |record, with| self.adopt_guest(record, &base, with)) {
                Ok(session) => gone_on.push(session),
                Err(error) => {
                    self.setup.console.error(&format!(
                        "the session of the guest (key {key}) cannot go on; switch it off: {error:#}"
                    ));
                    self.setup.records.forget(name, place)?;
                }
            }
        }
        Ok(gone_on)
    }

    fn adopt_guest(&self, record: &Record, base: &Arc<Base>, with: With<'_>) -> anyhow::Result<Served> {
        let (Transport::Nbd { port, export }, Some(limit)) = (&record.transport, record.memory) else {
            bail!("it is no guest's");
        };
        let upper = self.setup.records.memory(record.place)?;
        let at = At::again(&record.link, *port);
        Served::adopt_guest(with, Arc::clone(base), (upper, limit), export, at)
    }

    fn resume_one(
        self: &Arc<Self>,
        record: Record,
        disk: &Disk,
        serve: impl FnOnce(&Record, With<'_>) -> anyhow::Result<Served>,
    ) -> anyhow::Result<(SessionName, ControlKey)> {
        // Taken down if the rest fails.
        let link = Up::adopt(record.link.clone());
        let name: SessionName = record.session.parse()?;
        let machine = record.machine.parse()?;
        let with = With {
            machine: &*self.setup.machine,
            disk,
            watch: &|export: &Export| self.watch(name, export),
        };
        let served = serve(&record, with)?;
        let peer = IpAddr::V6(record.link.desktop);
        self.links.add(name, link);
        self.seat().sessions.push(Session {
            holder: Holder {
                session: name,
                peer: record.peer,
                key: record.key,
                machine,
            },
            place: record.place,
            served,
            warned: false,
        });
        // What was heard since it was noted may be said again, once.
        self.begin_life(name, &record.control, peer, Some(record.beat));
        Ok((name, record.control))
    }
}
